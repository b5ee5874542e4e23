"""Block-sparse attention: a policy's `BlockSelection` becomes the lists that the native kernel reads.

Legend: T rows of the sequence, H query heads, X head groups of the selection (1, G or H), D head size, Q query blocks,
B key blocks, L cached tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages
from hasten.attention.pieces import Rows
from hasten.attention.policy import BlockSelection
from hasten.kernels.block_list import BlockLists, Cached, attend_blocks, query_blocks

__all__ = ["attend_selection", "block_lists", "cached_of"]


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
