"""The page pool: which pages are free, and how many owners each page has.

A page is an integer id, valid in every layer. It is owned by sequences, by snapshots and by the prefix store;
each owner holds one reference, and the last release puts the page back on the free list. A page with one owner
may be written; a shared page is copied first (`hasten.lm.kvcache.cache.KVCache.reserve`).
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Reference counts and the free list of ``count`` pages. Pages are reused most recently freed first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.refs = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def allocate(self) -> int:
        """A page with one reference, content undefined. Callers make room first: the list is not empty."""
        page = self._free.pop()
        self.refs[page] = 1
        return page

    def retain(self, pages: Iterable[int]) -> None:
        """Add one owner to each page."""
        refs = self.refs
        for page in pages:
            if refs[page] < 1:
                raise RuntimeError(f"page {page} is free and cannot be shared")
            refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one owner of each page; ownerless pages become free."""
        refs = self.refs
        for page in pages:
            if refs[page] < 1:
                raise RuntimeError(f"page {page} is released more often than it was retained")
            refs[page] -= 1
            if refs[page] == 0:
                self._free.append(page)
