"""The paged KV cache: sequences as lists of reference-counted pages, with copy on write.

A sequence's token i lies in ``pages[i // P]`` at offset ``i % P``, in every layer. Where a technique keeps fewer tokens
in some layers (dropped rows, skipped attention), ``missing[layer]`` counts what that layer lacks: its tokens are packed
at the front of the same pages, and `StepLayout.layers` tells kernels and policies the layer's own length.

What the cache can do with a sequence: reserve (make slots exist and writable), truncate, fork, snapshot and roll
back, close. A snapshot also *pins* its pages: they stay until it is released. Recomputing tokens [a, b) in place
is an ordinary step with `Work.start` = a: `reserve` copies what is shared, the rows overwrite the slots.

Legend: N pages of the pool, M pages per sequence, P page size, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.attention.layout import Extent
from hasten.attention.policy import SidecarSpec
from hasten.core.errors import SettingError, UnsupportedError
from hasten.lm.kvcache.format import KVFormat
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefix import PrefixStore
from hasten.lm.kvcache.sidecar import Sidecars, page_bytes
from hasten.models.config import HeadShape

_NO_ROW = -1


@dataclass
class SequenceKV:
    """What the cache holds of one sequence.

    length: tokens computed (positions 0..length-1 of the sequence are cached).
    pages: page ids in token order; may reach further than ``length`` (reserved ahead).
    row: the sequence's row of the shared page table, -1 while it is not running.
    missing: int64 [L], cached tokens that each layer lacks, or None for none.
    floor: the sequence cannot be truncated below this length (its tokens before it cannot be computed again).
    segments: where the parts of its prompt end, in tokens (see `PrefixStore`).
    asked: the tokens it was opened with, and how many were stored, until the store hears that it runs.
    extents: where the pages it was opened with hold tokens (`States`).
    exact: under a policy that repairs (`AttentionPolicy.repair`), the leading tokens that were computed densely from
        such tokens; None while nobody keeps track.
    """

    id: int
    length: int
    pages: list[int]
    row: int = _NO_ROW
    missing: NDArray[np.int64] | None = None
    floor: int = 0
    segments: Sequence[int] = ()
    asked: tuple[Sequence[int], int] | None = None
    extents: tuple[Extent, ...] = ()
    exact: int | None = None


@dataclass(frozen=True)
class States:
    """Keys and values computed apart from the sequence that starts with them.

    pages: whole pages, in the order in which the sequence has them. extents: the slots of them that hold tokens.
    """

    pages: tuple[int, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Snapshot:
    """A frozen view of a sequence's pages; holds references until `KVCache.release`."""

    length: int
    pages: tuple[int, ...]
    missing: NDArray[np.int64] | None
    floor: int
    exact: int | None = None


class KVCache:
    """Pages, sidecars, prefix store and the page table of running sequences, for one loaded model.

    rows: most sequences that run at once; one more row is for what `attach` puts aside. evictors: release up to so many
    pages that nobody uses and return how many, asked after the prefix store. grid: prefixes are shared in multiples of
    so many tokens (`AttentionPolicy.grid`). table_RM: int32 page table, -1 past a sequence's pages, kept up to date
    as pages come and go so that no step rebuilds it.
    """

    def __init__(
        self,
        format: KVFormat,
        store: PrefixStore,
        *,
        layers: int,
        shape: HeadShape,
        pages: int,
        page_size: int,
        rows: int,
        context: int,
        sidecars: Sequence[SidecarSpec] = (),
        grid: int = 1,
    ) -> None:
        self.format, self.store, self.grid = format, store, grid
        self.layers, self.shape, self.page_size = layers, shape, page_size
        self.pool = PagePool(pages)
        self.sidecars = Sidecars(sidecars, layers, pages, page_size, shape)
        format.allocate(layers, pages, page_size, shape)
        store.bind(self.pool, format, page_size, self.sidecars)
        self.page_bytes = bytes_of_page(format, sidecars, layers, page_size, shape)
        self.context = min(context, pages * page_size)
        self.evictors: list[Callable[[int], int]] = []
        width = -(-self.context // page_size)
        self.table_RM: NDArray[np.int32] = np.full((rows + 1, width), -1, dtype=np.int32)
        self._free_rows = list(range(rows - 1, -1, -1))
        self._absent: frozenset[int] = frozenset()  # layers that stored pages lack altogether

    # -- opening and closing -------------------------------------------------------------------------------------

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def open(
        self,
        sequence_id: int,
        token_ids: Sequence[int] = (),
        *,
        segments: Sequence[int] = (),
        states: States | None = None,
    ) -> SequenceKV:
        """A sequence that starts with the pages of the longest stored prefix of ``token_ids``, or with ``states``.

        At least the last token stays to be computed: its logits are needed. segments: where the prompt's parts end.
        """
        if states is not None:
            self.pool.retain(states.pages)
            length = len(states.pages) * self.page_size
            return SequenceKV(sequence_id, length, list(states.pages), floor=length, extents=states.extents)
        pages: list[int] = []
        if token_ids:
            whole = self.format.shareable(len(token_ids) - 1, self.page_size)
            pages = self.store.match(token_ids[:whole], segments)
            if self.grid > 1:
                step = math.lcm(self.grid, self.page_size)
                pages = pages[: len(pages) * self.page_size // step * step // self.page_size]
            self.pool.retain(pages)
        kv = SequenceKV(sequence_id, len(pages) * self.page_size, pages, segments=segments)
        if token_ids:
            kv.asked = (token_ids, kv.length)
        if pages and self._absent:
            kv.missing = np.zeros(self.layers, dtype=np.int64)
            kv.missing[list(self._absent)] = kv.length
        return kv

    def attach(self, kv: SequenceKV, aside: bool = False) -> None:
        """Give a sequence a row of the page table; needed to run. ``free_rows`` must not be 0.

        aside: the one row that no request uses, for a sequence that is computed and detached between two steps.
        """
        kv.row = len(self.table_RM) - 1 if aside else self._free_rows.pop()
        self.table_RM[kv.row, : len(kv.pages)] = kv.pages
        if kv.asked is not None:
            self.store.accessed(kv.asked[0], kv.segments, kv.asked[1])
            kv.asked = None

    def detach(self, kv: SequenceKV) -> None:
        if kv.row != _NO_ROW:
            self.table_RM[kv.row] = -1
            if kv.row != len(self.table_RM) - 1:
                self._free_rows.append(kv.row)
            kv.row = _NO_ROW

    def close(self, kv: SequenceKV) -> None:
        """Release the sequence's pages and row. Pages that the prefix store also holds stay."""
        self.detach(kv)
        self.pool.release(kv.pages)
        self.format.forget(kv.id)
        kv.pages, kv.length, kv.missing, kv.floor, kv.extents, kv.exact = [], 0, None, 0, (), None

    # -- growing and shrinking -----------------------------------------------------------------------------------

    def reserve(self, kv: SequenceKV, start: int, stop: int) -> bool:
        """Make the slots of tokens [start, stop) exist and belong to ``kv`` alone.

        Evicts stored prefixes when pages are short. False, with nothing changed, when that is not enough.
        """
        size, pages, refs = self.page_size, kv.pages, self.pool.refs
        have, want = len(pages), -(-stop // size)
        shared = [i for i in range(start // size, min(want, have)) if refs[pages[i]] > 1]
        if kv.missing is not None:
            for lack in set(kv.missing.tolist()) - {0}:
                low, high = max(0, start - lack) // size, -(-max(0, stop - lack) // size)
                shared += [i for i in range(low, min(high, have)) if refs[pages[i]] > 1 and i not in shared]
        need = max(0, want - have) + len(shared)
        if need > self.pool.free:
            for evict in (self.store.evict, *self.evictors):
                evict(max(0, need - self.pool.free))
            if need > self.pool.free:
                return False
        for i in shared:
            self._own(kv, i)
        for i in range(have, want):
            page = self.pool.allocate()
            pages.append(page)
            if kv.row != _NO_ROW:
                self.table_RM[kv.row, i] = page
        return True

    def gather(self, kv: SequenceKV, start: int, chosen: Sequence[int]) -> None:
        """Token start + i becomes what token start + chosen[i] is (ascending); all lie in slots reserved for ``kv``."""
        moved = [(start + c, start + i) for i, c in enumerate(chosen) if c != i]
        if moved:
            if self.sidecars.tensors:
                raise UnsupportedError("tokens cannot be moved: an attention policy keeps sidecars of them")
            place = torch.tensor(moved)
            page = torch.tensor(kv.pages)[place // self.page_size]
            slot_T2 = page * self.page_size + place % self.page_size
            self.format.copy_tokens(slot_T2[:, 0], slot_T2[:, 1])

    def truncate(self, kv: SequenceKV, length: int) -> None:
        """Forget the tokens from ``length`` on and release the pages that held only those."""
        if length < kv.floor:
            raise UnsupportedError(
                f"sequence {kv.id} cannot be cut to {length} tokens: those before token {kv.floor} cannot be computed "
                "again (a layer hook dropped rows, or they came with the prompt as states)"
            )
        keep = -(-length // self.page_size)
        if keep < len(kv.pages):
            self.pool.release(kv.pages[keep:])
            del kv.pages[keep:]
            if kv.row != _NO_ROW:
                self.table_RM[kv.row, keep:] = -1
        if kv.missing is not None:
            kv.missing[kv.missing == kv.length] = min(kv.length, length)
        kv.length = min(kv.length, length)
        if kv.exact is not None:
            kv.exact = min(kv.exact, length)

    # -- sharing -------------------------------------------------------------------------------------------------

    def snapshot(self, kv: SequenceKV) -> Snapshot:
        """Pin the sequence's state. Whoever takes a snapshot releases it (`release`)."""
        pages = tuple(kv.pages[: -(-kv.length // self.page_size)])
        self.pool.retain(pages)
        return Snapshot(
            kv.length, pages, None if kv.missing is None else kv.missing.copy(), kv.floor, kv.exact
        )

    def release(self, snapshot: Snapshot) -> None:
        self.pool.release(snapshot.pages)

    def rollback(self, kv: SequenceKV, snapshot: Snapshot) -> None:
        """Put the sequence back to where the snapshot was taken. The snapshot stays valid."""
        self.pool.retain(snapshot.pages)
        self.pool.release(kv.pages)
        kv.pages, kv.length, kv.floor = list(snapshot.pages), snapshot.length, snapshot.floor
        kv.exact = snapshot.exact
        kv.missing = None if snapshot.missing is None else snapshot.missing.copy()
        if kv.row != _NO_ROW:
            self.table_RM[kv.row] = -1
            self.table_RM[kv.row, : len(kv.pages)] = kv.pages

    def fork(self, kv: SequenceKV, sequence_id: int) -> SequenceKV:
        """A second sequence with the same tokens, sharing every page until one of the two writes."""
        seen = self.snapshot(kv)
        self.format.forked(kv.id, sequence_id)
        return SequenceKV(
            sequence_id,
            seen.length,
            list(seen.pages),
            missing=seen.missing,
            floor=seen.floor,
            segments=kv.segments,
            extents=kv.extents,
            exact=seen.exact,
        )

    def rename(self, kv: SequenceKV, sequence_id: int) -> None:
        """Give a sequence that has not run yet its id."""
        self.format.renamed(kv.id, sequence_id)
        kv.id = sequence_id

    def offer_prefix(self, kv: SequenceKV, token_ids: Sequence[int]) -> None:
        """Let the prefix store keep the whole pages of the sequence's first ``len(token_ids)`` tokens.

        Pages that lack some tokens of a layer are not offered; a layer that never attends is no obstacle. Nor are those
        whose repair is still to come.
        """
        absent: frozenset[int] = frozenset()
        if kv.missing is not None:
            absent = frozenset(np.flatnonzero(kv.missing).tolist())
            if any(kv.missing[layer] != kv.length for layer in absent):
                return
        if self.store.empty:
            self._absent = absent
        if absent == self._absent:
            sound = min(len(token_ids), kv.length if kv.exact is None else kv.exact)
            whole = self.format.shareable(sound, self.page_size) // self.page_size
            self.store.insert(token_ids[: whole * self.page_size], kv.pages[:whole], kv.segments)

    def _own(self, kv: SequenceKV, i: int) -> None:
        page = self.pool.allocate()
        self.format.copy_page(kv.pages[i], page)
        self.sidecars.copy_page(kv.pages[i], page)
        self.pool.release((kv.pages[i],))
        kv.pages[i] = page
        if kv.row != _NO_ROW:
            self.table_RM[kv.row, i] = page

    # -- facts ---------------------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes reserved for pages and sidecars."""
        return self.pool.count * self.page_bytes

    def layout_tables(self, rows: Sequence[int], pages: int) -> torch.Tensor:
        """int32 [S, M]: the page tables of these rows, cut to ``pages`` columns."""
        return torch.from_numpy(self.table_RM[rows, :pages])


def bytes_of_page(
    format: KVFormat, sidecars: Sequence[SidecarSpec], layers: int, page_size: int, shape: HeadShape
) -> int:
    """Bytes of one page over all layers, sidecars included."""
    return format.page_bytes(layers, page_size, shape) + page_bytes(sidecars, layers, page_size, shape)


def pages_in_budget(budget_bytes: float, bytes_per_page: int) -> int:
    """Whole pages within the budget; `SettingError` if not even two fit."""
    pages = int(budget_bytes // bytes_per_page)
    if pages < 2:
        raise SettingError(
            f"kv_memory_mb = {budget_bytes / 1e6:g} holds {pages} pages of {bytes_per_page / 1e6:.3g} MB; "
            f"give at least {2 * bytes_per_page / 1e6:.3g} MB or a smaller page_size"
        )
    return pages
