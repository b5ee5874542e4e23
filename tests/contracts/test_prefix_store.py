from __future__ import annotations

import random

import pytest
import torch

from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefix import NoPrefixStore, RadixPrefixStore
from hasten.models.config import HeadShape

SLOT = "prefix_store"
DEFAULTS = {"radix": RadixPrefixStore, "none": NoPrefixStore}


def bound(store, pages: int = 64, size: int = 4):
    pool, format = PagePool(pages), PlainKV()
    format.allocate(1, pages, size, HeadShape(1, 1, 2))
    store.bind(pool, format, size)
    return store, pool


@pytest.mark.parametrize("seed", range(5))
def test_only_true_prefixes_and_no_leaks(provider, seed):
    """Requests come, use what is stored, offer what they computed and leave; pages are evicted in between.

    Each page holds a number that stands for the whole prefix it ends: a store may move it to another page.
    """
    store, pool = bound(provider())
    rng = random.Random(seed)
    numbers: dict[tuple[int, ...], int] = {}
    running: list[list[int]] = []
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 25))]
        pages = list(store.match(tokens))
        assert len(pages) <= len(tokens) // 4
        for i, page in enumerate(pages):
            held = store.format.pages(0).k_NGPD[page]
            assert torch.equal(held, torch.full_like(held, numbers[tuple(tokens[: 4 * (i + 1)])]))
        pool.retain(pages)
        need = len(tokens) // 4 - len(pages)
        if pool.free < need:
            freed = store.evict(need - pool.free)
            assert freed <= need
        if pool.free >= need:
            for i in range(len(pages), len(pages) + need):
                pages.append(pool.allocate())
                number = numbers.setdefault(tuple(tokens[: 4 * (i + 1)]), len(numbers))
                store.format.pages(0).k_NGPD[pages[-1]] = number
            store.insert(tokens, pages)
        running.append(pages)
        if len(running) > 4:
            pool.release(running.pop(0))
        in_use = {page for pages in running for page in pages}
        assert pool.used <= len(in_use) + len(store)
        assert all(pool.refs[page] >= 1 for page in in_use)
    for pages in running:
        pool.release(pages)
    assert pool.used == len(store)
    store.clear()
    assert len(store) == 0
    assert pool.used == 0


def test_only_whole_parts_of_the_same_prompt(provider):
    """Prompts that say where their parts end: what is found is a true prefix, and no page is lost or held twice."""
    store, pool = bound(provider())
    pages = [pool.allocate() for _ in range(5)]
    tokens = list(range(20))
    store.insert(tokens, pages, (6, 13, 17))
    pool.release(pages)
    assert pool.used == len(store)
    for other in (tokens, [*tokens[:13], 99, *tokens[14:]], [99, *tokens[1:]]):
        same = next((i for i in range(20) if other[i] != tokens[i]), 20)
        found = store.match(other, (6, 13, 17))
        assert list(found) == pages[: len(found)]
        assert len(found) * 4 <= same
        assert store.cached(other, (6, 13, 17)) == len(found) * 4
    assert store.cut(14, (6, 13, 17)) <= 14
    store.clear()
    assert pool.used == 0


def test_pages_in_use_stay(provider):
    store, pool = bound(provider())
    pages = [pool.allocate(), pool.allocate()]
    store.insert(list(range(8)), pages)
    store.evict(64)
    assert [pool.refs[p] >= 1 for p in pages] == [True, True]
    assert store.match(list(range(8))) in ([], pages, pages[:1])


def test_short_and_empty_prompts(provider):
    store, pool = bound(provider())
    assert store.match([]) == []
    assert store.match([1, 2]) == []
    store.insert([1, 2], [])
    assert store.evict(3) == 0
    assert pool.used == 0
