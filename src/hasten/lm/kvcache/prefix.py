"""Slot ``prefix_store``: which KV pages already exist.

The store maps token prefixes to pages whose keys and values are computed. A new sequence takes the pages of its
longest stored prefix instead of computing them; when pages run out the cache asks the store to give some back.

What a store may rely on, and how other needs are reached:

* Only whole pages of plain prompts come here (tokens from position 0 on, no replaced embeddings, no dropped rows),
  so equal tokens mean equal pages in every layer.
* The store owns one reference of each page it keeps. A page with exactly one reference is used by nobody else
  and may be given back. Pinning a page is holding a second reference (`KVCache.snapshot`).
* Tiers: a store that keeps pages elsewhere (RAM arena, file) reads them with `KVFormat.read_page` and puts them into a
  freshly allocated page with `KVFormat.write_page`; what a policy keeps beside it moves with `Sidecars`.
* Prompts may say where their parts (instructions, documents) end: ``segments``, ascending token counts. What follows
  the last one is the request's own. A store that keeps whole parts cuts there; others need not look.
* Lengths per layer are a matter of the sequence (`SequenceKV.missing`), recomputing a range in place a matter of the
  scheduler (`Work.start`); neither concerns a store, whose pages are never written after they were stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hasten.lm.kvcache.format import KVFormat
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.sidecar import Sidecars

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.lm.scheduling.order import AdmissionOrder


class PrefixStore(ABC):
    """Pages by token prefix. One instance per loaded model; calls come from one thread.

    speculative_prefills: a prompt whose documents are still being searched may be computed ahead for a provisional list
    of them while fewer prompts than this are being read (`hasten.lm.context.retrieval`); 0: never.
    """

    speculative_prefills: int = 0

    def bind(
        self, pool: PagePool, format: KVFormat, page_size: int, sidecars: Sidecars | None = None
    ) -> None:
        """Called once, after the cache is allocated."""
        self.pool = pool
        self.format = format
        self.page_size = page_size
        self.sidecars = sidecars

    def ready(self, engine: Engine) -> None:
        """Called once, when the engine could run: a store that weighs pages by their cost measures it here."""

    @abstractmethod
    def match(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> list[int]:
        """Pages, in token order, of the longest stored prefix of ``token_ids`` (whole pages only).

        Takes no reference for the caller, who retains the pages before anything else happens.
        """

    @abstractmethod
    def insert(self, token_ids: Sequence[int], pages: Sequence[int], segments: Sequence[int] = ()) -> None:
        """Offer computed pages: page i holds tokens [i * P, (i + 1) * P). The store retains what it keeps."""

    @abstractmethod
    def evict(self, count: int) -> int:
        """Release ``count`` pages that nobody else uses, least useful first; return how many.

        Fewer when there are no more; more only as far as the last thing released is kept or dropped as a whole.
        """

    def accessed(self, token_ids: Sequence[int], segments: Sequence[int], cached: int) -> None:
        """A sequence starts to run with these tokens, ``cached`` of them from stored pages. Once per start."""

    def cached(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> int:
        """Tokens that `match` would find."""
        return len(self.match(token_ids, segments)) * self.page_size

    def cut(self, tokens: int, segments: Sequence[int], *, after: bool = False) -> int:
        """The last place at or before ``tokens`` where the store may cut such a prompt.

        after: instead, how far it will keep a prompt that is computed up to there and goes on.
        """
        return tokens // self.page_size * self.page_size

    def admission_order(self) -> AdmissionOrder | None:
        """In which order waiting sequences make the most of what is stored; None: as they came."""
        return None

    @property
    def empty(self) -> bool:
        """Whether nothing is stored, in no tier."""
        return len(self) == 0

    @abstractmethod
    def clear(self) -> None:
        """Release every page."""

    @abstractmethod
    def __len__(self) -> int:
        """Pages held."""


class NoPrefixStore(PrefixStore):
    """Keeps nothing: every prompt is computed from its first token."""

    def match(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> list[int]:
        return []

    def insert(self, token_ids: Sequence[int], pages: Sequence[int], segments: Sequence[int] = ()) -> None:
        return

    def evict(self, count: int) -> int:
        return 0

    def clear(self) -> None:
        return

    def __len__(self) -> int:
        return 0


class _Node:
    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, key: tuple[int, ...], page: int, parent: _Node | None) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}


class RadixPrefixStore(PrefixStore):
    """The default: a radix tree whose edges are whole pages of tokens, evicted least recently used first.

    ``_order`` lists the nodes by last use. A path is touched from its leaf to the root, so children come before their
    parents and the oldest unused node is a leaf; eviction needs no search.
    """

    def __init__(self) -> None:
        self._root = _Node((), -1, None)
        self._order: OrderedDict[_Node, None] = OrderedDict()

    def match(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> list[int]:
        node, pages = self._root, []
        size = self.page_size
        for start in range(0, len(token_ids) - size + 1, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            pages.append(child.page)
            node = child
        self._touch(node)
        return pages

    def insert(self, token_ids: Sequence[int], pages: Sequence[int], segments: Sequence[int] = ()) -> None:
        node = self._root
        size = self.page_size
        for i, page in enumerate(pages):
            key = tuple(token_ids[i * size : (i + 1) * size])
            if len(key) < size:
                break
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(key, page, node)
                self.pool.retain((page,))
            node = child
        self._touch(node)

    def evict(self, count: int) -> int:
        refs = self.pool.refs
        freed = 0
        for _ in range(len(self._order)):
            if freed == count:
                break
            node = next(iter(self._order))
            if node.children or refs[node.page] > 1:
                self._order.move_to_end(node)  # in use, hence recent
                continue
            del self._order[node]
            assert node.parent is not None
            del node.parent.children[node.key]
            self.pool.release((node.page,))
            freed += 1
        return freed

    def clear(self) -> None:
        self.pool.release(node.page for node in self._order)
        self._order.clear()
        self._root.children.clear()

    def __len__(self) -> int:
        return len(self._order)

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._order[node] = None
            self._order.move_to_end(node)
            node = node.parent
