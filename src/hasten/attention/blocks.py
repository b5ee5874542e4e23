"""Block-sparse attention: a policy's `BlockSelection` becomes the lists that the native kernel reads.

Legend: T rows of the sequence, H query heads, X head groups of the selection (1, G or H), D head size, Q query blocks,
B key blocks, L cached tokens.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pieces import Rows
from hasten.attention.policy import AttentionPolicy, BlockSelection, Dense, Selection
from hasten.kernels.block_list import BlockLists, Cached, attend_blocks, query_blocks

__all__ = ["BlockPrefillPolicy", "attend_selection", "block_lists", "cached_of"]


class BlockPrefillPolicy(AttentionPolicy):
    """Block-sparse prefill: sequences that bring enough rows and have enough cached read what `choose` says.

    Everything else is dense, so steps of single rows may run natively.
    """

    def __init__(self, layers: int) -> None:
        self._selectors = (None,) * layers
        self._rows: Rows | None = None
        self._layout: StepLayout | None = None
        self._sequences: list[int] = []

    @property
    @abstractmethod
    def fewest(self) -> tuple[int, int]:
        """Rows that a sequence has to bring, and cached tokens that it has to exceed, to be sparse."""

    @abstractmethod
    def choose(
        self, sequence: int, layer: int, q_THD: Tensor, cached: Cached, spec: AttentionSpec
    ) -> BlockSelection:
        """What the rows ``q_THD``, the last of the cached tokens, read."""

    def selectors(self) -> tuple[None, ...]:
        return self._selectors

    def begin_step(self, layout: StepLayout) -> None:
        rows, tokens = self.fewest
        rows_S = layout.query_start_S1[1:] - layout.query_start_S1[:-1]
        sparse_S = (rows_S >= rows) & (layout.kv_len_S > tokens)
        self._sequences = sparse_S.nonzero().flatten().tolist()
        self._rows, self._layout = (Rows.of(layout), layout) if self._sequences else (None, None)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if self._rows is None or spec.window is not None:
            return Dense()
        rows = self._rows if layout is self._layout else Rows.of(layout)  # hooks may have dropped rows
        q_THD = q_THD.contiguous()
        found = []
        for s in self._sequences:
            begin, end = int(rows.start_S1[s]), int(rows.start_S1[s + 1])
            if end > begin:
                found.append(self.choose(s, layer, q_THD[begin:end], cached_of(rows, s, pages), spec))
        return tuple(found)


def cached_of(rows: Rows, sequence: int, pages: KVPages) -> Cached:
    """The cached tokens of one sequence of the step."""
    return Cached(
        pages.k_NGPD,
        pages.v_NGPD,
        torch.from_numpy(rows.table_SM[sequence]),
        int(rows.length_S[sequence]),
    )


def block_lists(selection: BlockSelection, rows: int, length: int, spec: AttentionSpec) -> BlockLists:
    """Lists of the blocks to keep. Raises ValueError for a block length or a mask that does not fit."""
    block, query_block = selection.block, selection.query_block or selection.block
    if block < 1 or query_block < 1:
        raise ValueError(f"a block must hold at least one token, not {block} keys and {query_block} queries")
    keep = selection.keep_XQB.numpy()
    choices = keep.shape[0]
    if choices not in (1, spec.shape.kv_heads, spec.shape.heads):
        raise ValueError(
            f"keep_XQB has {choices} head groups; it needs 1, {spec.shape.kv_heads} or {spec.shape.heads}"
        )
    queries, key_blocks = query_blocks(rows, length, query_block), -(-length // block)
    if keep.shape[1] < queries or keep.shape[2] < key_blocks:
        raise ValueError(
            f"keep_XQB {keep.shape} is too small for {rows} rows and {length} tokens in blocks of {block}"
        )
    keep = keep[:, :queries, :key_blocks]
    start_J1 = np.zeros(choices * queries + 1, np.int32)
    np.cumsum(keep.sum(2).ravel(), out=start_J1[1:])
    block_C = np.nonzero(keep)[2].astype(np.int32)
    return BlockLists(
        choices,
        block,
        query_block,
        torch.from_numpy(start_J1),
        torch.from_numpy(block_C),
        selection.order_XL,
    )


def attend_selection(
    rows: Rows, selection: BlockSelection, q_THD: Tensor, pages: KVPages, spec: AttentionSpec
) -> Tensor:
    """Output float32 [T, H, D] of the selection's sequence; ``q_THD`` holds only its rows."""
    cached = cached_of(rows, selection.sequence, pages)
    lists = block_lists(selection, q_THD.shape[0], cached.length, spec)
    out, _ = attend_blocks(
        q_THD,
        cached,
        lists,
        spec.scale,
        spec.softcap,
        window=spec.window,
        floor_H=selection.floor_H,
        codes=selection.codes,
        visits=selection.visits,
    )
    return out
