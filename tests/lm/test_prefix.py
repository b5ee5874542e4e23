from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefix import RadixPrefixStore


def make(pages: int = 10, size: int = 2) -> tuple[RadixPrefixStore, PagePool]:
    store, pool = RadixPrefixStore(), PagePool(pages)
    store.bind(pool, PlainKV(), size)
    return store, pool


def put(store: RadixPrefixStore, pool: PagePool, tokens: list[int]) -> list[int]:
    """Compute pages for what is not stored, offer all, and let go of them."""
    found = store.match(tokens)
    pool.retain(found)
    pages = found + [pool.allocate() for _ in range(len(tokens) // store.page_size - len(found))]
    store.insert(tokens, pages)
    pool.release(pages)
    return pages


def test_longest_whole_pages_match():
    store, pool = make()
    pages = put(store, pool, [1, 2, 3, 4, 5])
    assert len(pages) == 2
    assert store.match([1, 2, 3, 4, 9, 9]) == pages
    assert store.match([1, 2, 3, 5]) == pages[:1]
    assert store.match([1]) == []
    assert store.match([2, 1]) == []
    other = put(store, pool, [1, 2, 7, 8])
    assert other[0] == pages[0]
    assert len(store) == 3
    assert pool.used == 3


def test_evicts_the_least_recently_used_leaf_first():
    store, pool = make()
    put(store, pool, [1, 2, 3, 4])
    put(store, pool, [5, 6, 7, 8])
    store.match([1, 2, 3, 4])
    assert store.evict(1) == 1
    assert store.match([5, 6, 7, 8])  # its leaf went, its root page stayed
    assert len(store.match([5, 6, 7, 8])) == 1
    assert len(store.match([1, 2, 3, 4])) == 2
    assert store.evict(99) == 3
    assert pool.free == 10


def test_pages_in_use_are_not_evicted():
    store, pool = make()
    pages = put(store, pool, [1, 2, 3, 4])
    put(store, pool, [5, 6])
    pool.retain(pages)
    assert store.evict(99) == 1
    assert store.match([1, 2, 3, 4]) == pages
    pool.release(pages)
    store.clear()
    assert pool.free == 10
    assert store.match([1, 2]) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.integers(0, 3)), max_size=30)
)
def test_agrees_with_a_plain_dictionary(steps):
    """Matches are real prefixes with the page that was stored for them; nothing leaks."""
    store, pool = make(pages=200)
    owner: dict[tuple[int, ...], int] = {}
    for tokens, evict in steps:
        for i, page in enumerate(put(store, pool, tokens)):
            owner[tuple(tokens[: (i + 1) * 2])] = page
        assert len(store.match(tokens)) == len(tokens) // 2
        store.evict(evict)
        found = store.match(tokens)
        assert all(owner[tuple(tokens[: (i + 1) * 2])] == page for i, page in enumerate(found))
        assert pool.used == len(store)
    store.clear()
    assert pool.used == 0
