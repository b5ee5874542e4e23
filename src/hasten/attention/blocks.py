"""Block-sparse attention as pieces: the kept key blocks of a query block, in order, are one run of pages.

Kept blocks rise in position, so what a row may see of its query block's piece is still a prefix: causality stays a
limit. Heads that keep different blocks become rows of their own: queries [T, H, D] are viewed as [T * X, H / X, D]
and the pool [N, G, P, D] as [N * G, 1, P, D], both without a copy.

Legend: T rows of the sequence, X head groups of the selection (1, G or H), Q query blocks, B key blocks, P page size.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages
from hasten.attention.pieces import Ints, Pieces, Rows, finish, prefix_sum, ranges
from hasten.attention.policy import BlockSelection
from hasten.core.errors import UnsupportedError
from hasten.kernels.schedule import default_workers


def block_pieces(rows: Rows, selection: BlockSelection, spec: AttentionSpec) -> Pieces:
    """Pieces of one sequence; row ``i * X + x`` is head group x of the sequence's i-th row of the step.

    Raises UnsupportedError for a permutation or a block that is not whole pages, ValueError for a bad mask.
    """
    heads, groups = spec.shape.heads, spec.shape.kv_heads
    block, s = selection.block, selection.sequence
    if selection.permutation_XT is not None:
        raise UnsupportedError("the dense kernel reads block selections in cache order, not permuted")
    if block < 1 or block % rows.page:
        raise UnsupportedError(
            f"a block must be whole pages: {block} tokens are not a multiple of {rows.page}"
        )
    begin, end, length = int(rows.start_S1[s]), int(rows.start_S1[s + 1]), int(rows.length_S[s])
    keep = selection.keep_XQB.numpy()
    choices, query_blocks, key_blocks = keep.shape
    if choices not in (1, groups, heads):
        raise ValueError(f"keep_XQB has {choices} head groups; it needs 1, {groups} or {heads}")
    if query_blocks < -(-(end - begin) // block) or key_blocks < -(-length // block):
        raise ValueError(
            f"keep_XQB {keep.shape} is too small for {end - begin} rows and {length} tokens in blocks of {block}"
        )
    limit_T = rows.limit_T[begin:end]
    query = np.arange(end - begin) // block
    if not keep[:, query, (limit_T - 1) // block].all():
        raise ValueError("keep_XQB drops a block on the causal diagonal")
    before = np.cumsum(keep, 2) - keep

    def seen_before(token_T: Ints) -> Ints:
        """[X, T]: how many kept tokens of the row's query block lie before this position."""
        at = np.minimum(token_T // block, key_blocks - 1)
        seen: Ints = before[:, query, at] * block + keep[:, query, at] * (token_T - at * block)
        return seen

    # Blocks past the last row of a query block are never seen.
    last_Q = np.zeros(query_blocks, np.int64)
    np.maximum.at(last_Q, query, limit_T)
    x, q, b = np.nonzero(keep & (np.arange(key_blocks) * block < last_Q[:, None]))
    per_block = block // rows.page
    count = np.minimum(per_block, -(-length // rows.page) - b * per_block)
    page = rows.table_SM[s, ranges(b * per_block, count)].astype(np.int64)
    if choices > 1:
        page = page * groups + np.repeat(x * groups // choices, count)
    pages_J = np.bincount(x * query_blocks + q, weights=count, minlength=choices * query_blocks)
    limit = seen_before(limit_T)
    first = np.zeros_like(limit) if spec.window is None else seen_before(np.maximum(limit_T - spec.window, 0))
    rows_J = np.tile(np.bincount(query, minlength=query_blocks), choices)
    return Pieces(
        page_C=page,
        page_start_J1=prefix_sum(pages_J.astype(np.int64)),
        base_J=np.zeros(choices * query_blocks, np.int64),
        row_start_J1=prefix_sum(rows_J),
        row_E=(np.arange(end - begin) * choices + np.arange(choices)[:, None]).ravel(),
        first_E=first.ravel(),
        limit_E=limit.ravel(),
    )


def attend_blocks(
    rows: Rows, selection: BlockSelection, q_THD: Tensor, pages: KVPages, spec: AttentionSpec
) -> Tensor:
    """Output float32 [T, H, D] of the selection's sequence; ``q_THD`` holds only its rows."""
    heads, groups, size = spec.shape.heads, spec.shape.kv_heads, spec.shape.size
    pieces = block_pieces(rows, selection, spec)
    choices = selection.keep_XQB.shape[0]
    k, v = pages.k_NGPD, pages.v_NGPD
    if choices > 1:
        k, v = k.view(-1, 1, *k.shape[2:]), v.view(-1, 1, *v.shape[2:])
        heads, groups = heads // choices, 1
    plan = finish(pieces, q_THD.shape[0] * choices, rows.page, heads, groups, default_workers())
    out, _ = plan.attend(q_THD.view(-1, heads, size), k, v, spec.scale, spec.softcap)
    return out.view(q_THD.shape)
