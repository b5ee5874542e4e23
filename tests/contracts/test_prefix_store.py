from __future__ import annotations

import random

import pytest

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
    """Requests come, use what is stored, offer what they computed and leave; pages are evicted in between."""
    store, pool = bound(provider())
    rng = random.Random(seed)
    content: dict[int, tuple[int, ...]] = {}  # page -> the whole prefix it ends
    running: list[list[int]] = []
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 25))]
        pages = list(store.match(tokens))
        assert len(pages) <= len(tokens) // 4
        for i, page in enumerate(pages):
            assert content[page] == tuple(tokens[: 4 * (i + 1)])
        pool.retain(pages)
        need = len(tokens) // 4 - len(pages)
        if pool.free < need:
            freed = store.evict(need - pool.free)
            assert freed <= need
        if pool.free >= need:
            for i in range(len(pages), len(pages) + need):
                pages.append(pool.allocate())
                content[pages[-1]] = tuple(tokens[: 4 * (i + 1)])
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
