from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention.layout import StepLayout
from hasten.attention.policy import SidecarSpec
from hasten.core.errors import SettingError, UnsupportedError
from hasten.lm.kvcache.cache import KVCache, SequenceKV, bytes_of_page, pages_in_budget
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefix import NoPrefixStore, RadixPrefixStore
from hasten.models.config import HeadShape

SHAPE = HeadShape(heads=4, kv_heads=2, size=8)


def make(pages: int = 16, size: int = 4, rows: int = 4, store: object = None, **more: object) -> KVCache:
    return KVCache(
        PlainKV(),
        store or RadixPrefixStore(),
        layers=2,
        shape=SHAPE,
        pages=pages,
        page_size=size,
        rows=rows,
        context=1000,
        **more,
    )


def write(cache: KVCache, kv: SequenceKV, start: int, values: list[float]) -> None:
    """Put recognisable keys and values into tokens ``start...`` and advance the sequence."""
    assert cache.reserve(kv, start, start + len(values))
    size = cache.page_size
    slots = [kv.pages[i // size] * size + i % size for i in range(start, start + len(values))]
    layout = StepLayout(
        torch.tensor([0, len(values)], dtype=torch.int32),
        torch.tensor([start + len(values)], dtype=torch.int32),
        torch.tensor([kv.pages], dtype=torch.int32),
        torch.arange(len(values)),
        torch.tensor(slots),
        cache.page_size,
        (kv.id,),
    )
    k = torch.tensor(values).view(-1, 1, 1).expand(-1, SHAPE.kv_heads, SHAPE.size)
    for layer in range(cache.layers):
        cache.format.append(layer, k, -k, layout)
    kv.length = max(kv.length, start + len(values))


def read(cache: KVCache, kv: SequenceKV, layer: int = 1) -> list[float]:
    pages = cache.format.pages(layer)
    k = pages.k_NGPD[kv.pages][:, 0, :, 0].flatten()[: kv.length]
    v = pages.v_NGPD[kv.pages][:, 0, :, 0].flatten()[: kv.length]
    assert torch.equal(k, -v)
    return k.tolist()


def test_pool_counts():
    pool = PagePool(3)
    a, b = pool.allocate(), pool.allocate()
    pool.retain([a])
    pool.release([a, b])
    assert (pool.free, pool.used) == (2, 1)
    pool.release([a])
    assert pool.free == 3
    with pytest.raises(RuntimeError, match="more often"):
        pool.release([a])
    with pytest.raises(RuntimeError, match="free"):
        pool.retain([a])


def test_append_grows_page_by_page_and_table_follows():
    cache = make()
    kv = cache.open(1)
    cache.attach(kv)
    write(cache, kv, 0, [1, 2, 3])
    assert len(kv.pages) == 1
    write(cache, kv, 3, [4, 5, 6, 7, 8, 9])
    assert len(kv.pages) == 3
    assert read(cache, kv) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert cache.table_RM[kv.row, :4].tolist() == [*kv.pages, -1]
    cache.truncate(kv, 4)
    assert len(kv.pages) == 1
    assert kv.length == 4
    assert cache.table_RM[kv.row, :2].tolist() == [kv.pages[0], -1]
    cache.close(kv)
    assert cache.pool.free == 16
    assert cache.free_rows == 4
    assert (cache.table_RM == -1).all()


def test_fork_shares_until_written():
    cache = make()
    kv = cache.open(1)
    write(cache, kv, 0, [1, 2, 3, 4, 5, 6])
    other = cache.fork(kv, 2)
    assert cache.pool.used == 2
    write(cache, other, 6, [70, 80])
    assert cache.pool.used == 3  # only the half-full page was copied
    write(cache, kv, 6, [7, 8, 9])
    assert read(cache, kv) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert read(cache, other) == [1, 2, 3, 4, 5, 6, 70, 80]
    assert kv.pages[0] == other.pages[0]
    assert kv.pages[1] != other.pages[1]
    cache.close(kv)
    assert read(cache, other) == [1, 2, 3, 4, 5, 6, 70, 80]
    cache.close(other)
    assert cache.pool.used == 0


def test_recomputing_a_range_in_place_copies_what_is_shared():
    cache = make()
    kv = cache.open(1)
    write(cache, kv, 0, list(range(8)))
    other = cache.fork(kv, 2)
    write(cache, kv, 2, [20, 30, 40])
    assert read(cache, kv) == [0, 1, 20, 30, 40, 5, 6, 7]
    assert read(cache, other) == list(range(8))
    assert kv.length == 8


def test_snapshot_pins_and_rolls_back():
    cache = make()
    kv = cache.open(1)
    cache.attach(kv)
    write(cache, kv, 0, [1, 2, 3, 4, 5])
    seen = cache.snapshot(kv)
    write(cache, kv, 5, [60, 70, 80, 90])
    assert read(cache, kv)[5:] == [60, 70, 80, 90]
    cache.rollback(kv, seen)
    assert read(cache, kv) == [1, 2, 3, 4, 5]
    assert cache.table_RM[kv.row, :3].tolist() == [*kv.pages, -1]
    write(cache, kv, 5, [6])
    cache.rollback(kv, seen)
    assert read(cache, kv) == [1, 2, 3, 4, 5]
    cache.close(kv)
    assert cache.pool.used == 2  # still pinned
    cache.release(seen)
    assert cache.pool.used == 0


def test_reserve_is_all_or_nothing():
    cache = make(pages=3)
    kv = cache.open(1)
    assert cache.reserve(kv, 0, 8)
    before = list(kv.pages)
    assert not cache.reserve(kv, 8, 17)
    assert kv.pages == before
    assert cache.pool.free == 1


def test_sidecars_follow_every_copy():
    specs = (
        SidecarSpec("codes", (2,), torch.uint8),
        SidecarSpec("bounds", (3,), torch.float32, per="page", layers=(1,)),
    )
    cache = make(sidecars=specs)
    codes, bounds = cache.sidecars.by_name["codes"], cache.sidecars.by_name["bounds"]
    assert codes[0].shape == (16, 2, 4, 2)
    assert set(bounds) == {1}
    assert bounds[1].shape == (16, 2, 3)
    kv = cache.open(1)
    write(cache, kv, 0, [1, 2])
    codes[0][kv.pages[0]] = 7
    bounds[1][kv.pages[0]] = 0.5
    other = cache.fork(kv, 2)
    write(cache, other, 2, [3])
    assert other.pages != kv.pages
    assert (codes[0][other.pages[0]] == 7).all()
    assert (bounds[1][other.pages[0]] == 0.5).all()
    with pytest.raises(UnsupportedError, match="'row'"):
        make(sidecars=(SidecarSpec("x", (1,), torch.uint8, per="row"),))
    with pytest.raises(UnsupportedError, match="two sidecars"):
        make(sidecars=(specs[0], specs[0]))


@pytest.mark.parametrize("budget", [0.2, 1.0, 7.3])
def test_budget_counts_every_byte(budget):
    specs = (SidecarSpec("codes", (16,), torch.uint8), SidecarSpec("b", (8,), torch.float32, "page", (0,)))
    page = bytes_of_page(PlainKV(torch.bfloat16), specs, 2, 4, SHAPE)
    pages = pages_in_budget(budget * 1e6, page)
    cache = KVCache(
        PlainKV(torch.bfloat16),
        NoPrefixStore(),
        layers=2,
        shape=SHAPE,
        pages=pages,
        page_size=4,
        rows=2,
        context=10**6,
        sidecars=specs,
    )
    tensors = [t for kv in cache.format.layers for t in (kv.k_NGPD, kv.v_NGPD)]
    tensors += [t for layers in cache.sidecars.by_name.values() for t in layers.values()]
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert real == cache.bytes()
    assert 0.95 * budget * 1e6 <= real <= budget * 1e6
    with pytest.raises(SettingError, match="kv_memory_mb"):
        pages_in_budget(page * 1.5, page)


def test_layers_that_lack_tokens():
    cache = make()
    kv = cache.open(1)
    write(cache, kv, 0, list(range(8)))
    kv.missing, kv.floor = np.array([0, 3]), 6
    other = cache.fork(kv, 2)
    # Layer 1 packs its next token at index 8 - 3 = 5: that page is shared and must be copied, too.
    assert cache.reserve(kv, 8, 9)
    assert kv.pages[1] != other.pages[1]
    assert kv.pages[0] == other.pages[0]
    cache.truncate(kv, 6)
    with pytest.raises(UnsupportedError, match="dropped rows"):
        cache.truncate(kv, 5)
    cache.offer_prefix(kv, list(range(6)))
    assert len(cache.store) == 0  # incomplete pages are nobody else's business
    kv.missing = np.array([0, kv.length])  # a layer that never attends
    cache.offer_prefix(kv, list(range(6)))
    assert len(cache.store) == 1
    again = cache.open(3, list(range(6)))
    assert again.length == 4
    assert again.missing.tolist() == [0, 4]
    cache.truncate(again, 2)
    assert again.missing.tolist() == [0, 2]


def test_pages_move_out_and_in():
    cache = make()
    kv = cache.open(1)
    write(cache, kv, 0, [1, 2, 3, 4])
    content = cache.format.read_page(kv.pages[0])
    page = cache.pool.allocate()
    cache.format.write_page(page, content)
    kv.pages = [page]
    assert read(cache, kv) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="layers"):
        cache.format.write_page(page, content[:1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_operations_keep_content_and_counts(data):
    """Whatever happens, every live sequence reads what was written to it, and closing all frees all."""
    cache = make(pages=12, size=3, rows=8)
    live: dict[int, tuple[SequenceKV, list[float]]] = {}
    pinned: list[tuple[object, list[float]]] = []
    names = iter(range(10_000))
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(
            st.sampled_from(["open", "append", "append", "fork", "truncate", "close", "pin", "back"])
        )
        if action == "open" and len(live) < 8:
            kv = cache.open(next(names))
            cache.attach(kv)
            live[kv.id] = (kv, [])
        if not live:
            continue
        key = data.draw(st.sampled_from(sorted(live)))
        kv, content = live[key]
        if action == "append":
            new = [float(next(names)) for _ in range(data.draw(st.integers(1, 7)))]
            if cache.reserve(kv, len(content), len(content) + len(new)):
                write(cache, kv, len(content), new)
                live[key] = (kv, content + new)
        elif action == "fork" and len(live) < 8:
            other = cache.fork(kv, next(names))
            cache.attach(other)
            live[other.id] = (other, list(content))
        elif action == "truncate":
            length = data.draw(st.integers(0, len(content)))
            cache.truncate(kv, length)
            live[key] = (kv, content[:length])
        elif action == "close":
            cache.close(kv)
            del live[key]
        elif action == "pin" and len(pinned) < 2:
            pinned.append((cache.snapshot(kv), list(content)))
        elif action == "back" and pinned:
            snapshot, old = pinned[-1]
            cache.rollback(kv, snapshot)
            live[key] = (kv, list(old))
        for kv, content in live.values():
            assert read(cache, kv) == content
            assert cache.table_RM[kv.row, : len(kv.pages)].tolist() == kv.pages
            assert (cache.table_RM[kv.row, len(kv.pages) :] == -1).all()
    for kv, _ in live.values():
        cache.close(kv)
    for snapshot, _ in pinned:
        cache.release(snapshot)
    assert cache.pool.free == 12
    assert sum(cache.pool.refs) == 0
