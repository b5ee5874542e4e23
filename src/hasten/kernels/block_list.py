"""Attention over lists of key blocks, and what blocks are chosen by: pools, importance, an order of the keys.

See native/src/kernels/block_list.cpp and block_choice.cpp; `hasten.kernels.reference.block_list` says the same in
PyTorch. Everything here is about one sequence: its pages, and its rows in this step, which are the last of its tokens.
Query blocks lie at multiples of their length in the sequence, so the first and the last may be partly filled.

Legend: T rows, L cached tokens, H query heads, G kv heads, X heads of a choice (1, G or H), D head size, N pages, P
page size, M pages of the sequence, Q query blocks, B key blocks, J = X Q lists, C block references, W tiles
of 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.attention import cap_of, float_rows, index_array, pages_of
from hasten.kernels.native import native
from hasten.kernels.pages import page_kind

__all__ = [
    "TILE",
    "BlockLists",
    "Cached",
    "Codes",
    "Visits",
    "attend_blocks",
    "order_blocks",
    "pool_keys",
    "pool_rows",
    "probe_keys",
    "quantise_keys",
    "query_blocks",
]

TILE = 64
"""Tokens that are read together; blocks of whole tiles waste nothing."""


@dataclass(frozen=True, eq=False)
class Cached:
    """The cached tokens of one sequence.

    Pages: `hasten.kernels.pages` [N, G, P, D], contiguous. table_M: int32, page ids in token order. length: L.
    """

    k_NGPD: Tensor
    v_NGPD: Tensor
    table_M: Tensor
    length: int

    def native(self) -> tuple[int, int, int, int, int]:
        """(pages, kv heads, page size, head size, kind) of the pool. Raises TypeError and ValueError."""
        kind, tail = page_kind(self.k_NGPD, self.v_NGPD)
        if self.k_NGPD.dim() != 4 or self.k_NGPD.shape != self.v_NGPD.shape:
            raise ValueError(
                f"k_NGPD {tuple(self.k_NGPD.shape)} and v_NGPD {tuple(self.v_NGPD.shape)} must be equal [N, G, P, D]"
            )
        if not (self.k_NGPD.is_contiguous() and self.v_NGPD.is_contiguous()):
            raise ValueError("k_NGPD and v_NGPD must be contiguous")
        pages, groups, page, size = self.k_NGPD.shape
        return pages, groups, page, size - tail, kind

    @property
    def table(self) -> Any:
        return index_array("table_M", self.table_M, 1)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which key blocks each query block reads.

    start_J1, block_C: int32. Query block i of head group x reads the key blocks ``block_C[start_J1[x * Q + i]:...]``,
    rising. order_XL: int32 or None (cache order): key block b holds the tokens ``order_XL[x, b * block:][:block]``,
    rising within a block, every token once.
    """

    choices: int
    block: int
    query_block: int
    start_J1: Tensor
    block_C: Tensor
    order_XL: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Codes:
    """Keys less a vector per kv head, rounded to codes of at most ``limit`` per tile of 64 tokens (`quantise_keys`).

    code_GWD2: int16 [G, W, D / 2, 64, 2]. scale_GW: float32. A key is about code * scale + the vector.
    """

    code_GWD2: Tensor
    scale_GW: Tensor
    limit: int


@dataclass
class Visits:
    """How many tiles were met (each counts once per group of query vectors) and how many of them were left out."""

    met: int = 0
    skipped: int = 0
    share: float = field(init=False, default=0.0)

    def add(self, met: int, skipped: int) -> None:
        self.met, self.skipped = self.met + met, self.skipped + skipped
        self.share = self.skipped / self.met if self.met else 0.0


def query_blocks(rows: int, length: int, block: int) -> int:
    """Q: how many query blocks of ``block`` positions the last ``rows`` of ``length`` tokens touch."""
    return 0 if rows == 0 else (length - 1) // block - (length - rows) // block + 1


def attend_blocks(
    q_THD: Tensor,
    cached: Cached,
    lists: BlockLists,
    scale: float,
    softcap: float | None = None,
    *,
    window: int | None = None,
    floor_H: Tensor | None = None,
    codes: Codes | None = None,
    visits: Visits | None = None,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out_THD, lse_TH)`` float32 of the rows, which see the tokens of their lists up to themselves.

    q_THD: float32, contiguous. window: a row sees its last ``window`` tokens only. floor_H: float32 or None; where it
    is below 0, tiles that lie more than that (base 2) below what a group of the head's rows has seen are left out.
    codes: scores are products of codes (queries are rounded alike, per query block); what is subtracted from all
    keys alike changes no output, but ``lse`` by its score.

    Raises TypeError for a wrong dtype, ValueError for lists, orders and shapes that do not fit, and for a row that is
    left nothing to read.
    """
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_THD", q_THD)
    pages, groups, page, kind = pages_of(q_THD, cached.k_NGPD, cached.v_NGPD)
    order, code, code_scale = 0, 0, 0
    if lists.order_XL is not None:
        if lists.order_XL.shape != (lists.choices, cached.length):
            raise ValueError(
                f"order_XL must be {(lists.choices, cached.length)}, not shape {tuple(lists.order_XL.shape)}"
            )
        index_array("order_XL", lists.order_XL, 2)
        order = lists.order_XL.data_ptr()
    if codes is not None:
        tiles = -(-cached.length // TILE)
        if codes.code_GWD2.shape != (groups, tiles, size // 2, TILE, 2) or codes.scale_GW.shape != (
            groups,
            tiles,
        ):
            raise ValueError(
                f"codes of {tuple(codes.code_GWD2.shape)} are not of {cached.length} tokens and {groups} kv heads"
            )
        code, code_scale = codes.code_GWD2.data_ptr(), codes.scale_GW.data_ptr()
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")
    if floor_H is not None and (floor_H.dtype is not torch.float32 or floor_H.shape != (heads,)):
        raise ValueError(f"floor_H must be float32 {(heads,)}, not {floor_H.dtype} {tuple(floor_H.shape)}")
    floor_H = None if floor_H is None else floor_H.contiguous()
    out, lse = torch.empty((rows, heads, size)), torch.empty((rows, heads))
    met, skipped = lib.attend_blocks(
        q_THD.data_ptr(),
        cached.k_NGPD.data_ptr(),
        cached.v_NGPD.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        cached.table,
        index_array("start_J1", lists.start_J1, 1),
        index_array("block_C", lists.block_C, 1),
        order,
        code,
        code_scale,
        0 if floor_H is None else floor_H.data_ptr(),
        0 if codes is None else codes.limit,
        rows,
        cached.length,
        heads,
        groups,
        size,
        pages,
        page,
        kind,
        lists.choices,
        lists.block,
        lists.query_block,
        window or 0,
        scale,
        cap_of(softcap),
    )
    if visits is not None:
        visits.add(met, skipped)
    return out, lse


def probe_keys(
    q_THD: Tensor,
    cached: Cached,
    tokens: int,
    scale: float,
    softcap: float | None = None,
    *,
    module: ModuleType | None = None,
) -> Tensor:
    """float32 [H, tokens]: the mean over rows ``q_THD`` of their softmax over the first ``tokens`` keys, not causal.

    PBS-Attn's importance of keys. Raises TypeError for a wrong dtype, ValueError for shapes, no row or no token.
    """
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_THD", q_THD)
    pages, groups, page, kind = pages_of(q_THD, cached.k_NGPD, cached.v_NGPD)
    out_HL = torch.empty(heads, max(tokens, 0))
    lib.probe_keys(
        q_THD.data_ptr(),
        cached.k_NGPD.data_ptr(),
        cached.table,
        out_HL.data_ptr(),
        rows,
        cached.length,
        tokens,
        heads,
        groups,
        size,
        pages,
        page,
        kind,
        scale,
        cap_of(softcap),
    )
    return out_HL


def order_blocks(
    score_XL: Tensor, length: int, block: int, segment: int, *, module: ModuleType | None = None
) -> Tensor:
    """int32 [X, length]: tokens of each whole segment from the highest score down, cut into blocks.

    Within a block they rise, because a block is a set. ``score_XL`` covers the whole segments (float32 [X, length //
    segment * segment]); tokens after them stay. Equal scores go by position, NaN last. Raises ValueError.
    """
    lib = native() if module is None else module
    if score_XL.dtype is not torch.float32:
        raise TypeError(f"score_XL must be float32, not {score_XL.dtype}")
    order_XL = torch.empty(score_XL.shape[0], length, dtype=torch.int32)
    lib.order_blocks(score_XL.contiguous().numpy(), order_XL.numpy(), block, segment)
    return order_XL


def pool_keys(
    cached: Cached,
    block: int,
    *,
    choices: int | None = None,
    order_XL: Tensor | None = None,
    center_GD: Tensor | None = None,
    similarity: bool = False,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(mean_XBD, similarity_XB or None)`` float32 of the key blocks, in the given order, less ``center_GD``.

    X is ``choices``, by default G. The last block is the mean of the tokens it has. Similarity: the mean cosine of all
    pairs of a block's keys (SpargeAttn's self-similarity). Raises TypeError and ValueError.
    """
    lib = native() if module is None else module
    pages, groups, page, size, kind = cached.native()
    x = groups if choices is None else choices
    order = center = 0
    if order_XL is not None:
        if order_XL.shape != (x, cached.length):
            raise ValueError(f"order_XL must be {(x, cached.length)}, not shape {tuple(order_XL.shape)}")
        index_array("order_XL", order_XL, 2)
        if order_XL.numel() and not 0 <= int(order_XL.min()) <= int(order_XL.max()) < cached.length:
            raise ValueError("order_XL names a token past the end")
        order = order_XL.data_ptr()
    if center_GD is not None:
        center_GD = _center(center_GD, groups, size)
        center = center_GD.data_ptr()
    blocks = -(-cached.length // block) if block > 0 else 0
    mean_XBD = torch.empty(x, blocks, size)
    similarity_XB = torch.empty(x, blocks) if similarity else None
    lib.pool_keys(
        cached.k_NGPD.data_ptr(),
        cached.table,
        order,
        center,
        mean_XBD.data_ptr(),
        0 if similarity_XB is None else similarity_XB.data_ptr(),
        cached.length,
        x,
        block,
        groups,
        size,
        pages,
        page,
        kind,
    )
    return mean_XBD, similarity_XB


def pool_rows(
    q_THD: Tensor, first: int, block: int, *, similarity: bool = False, module: ModuleType | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(mean_HQD, similarity_HQ or None)`` float32 of the query blocks of rows at positions ``first`` and on."""
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_THD", q_THD)
    blocks = query_blocks(rows, first + rows, block) if block > 0 else 0
    mean_HQD = torch.empty(heads, blocks, size)
    similarity_HQ = torch.empty(heads, blocks) if similarity else None
    lib.pool_rows(
        q_THD.data_ptr(),
        mean_HQD.data_ptr(),
        0 if similarity_HQ is None else similarity_HQ.data_ptr(),
        rows,
        first,
        heads,
        size,
        block,
    )
    return mean_HQD, similarity_HQ


def quantise_keys(
    cached: Cached, center_GD: Tensor, bits: int = 8, *, module: ModuleType | None = None
) -> Codes:
    """The keys less ``center_GD`` (float32 [G, D]) as `Codes` of ``bits`` (2 to 12, sign included).

    Raises ValueError for an odd head size or other bits.
    """
    if not 2 <= bits <= 12:
        raise ValueError(f"bits must be 2 to 12, not {bits}")
    lib = native() if module is None else module
    pages, groups, page, size, kind = cached.native()
    center_GD = _center(center_GD, groups, size)
    tiles = -(-cached.length // TILE)
    codes = Codes(
        torch.empty(groups, tiles, size // 2, TILE, 2, dtype=torch.int16),
        torch.empty(groups, tiles),
        (1 << bits - 1) - 1,
    )
    lib.quantise_keys(
        cached.k_NGPD.data_ptr(),
        cached.table,
        center_GD.data_ptr(),
        codes.code_GWD2.data_ptr(),
        codes.scale_GW.data_ptr(),
        cached.length,
        groups,
        size,
        pages,
        page,
        kind,
        codes.limit,
    )
    return codes


def _center(center_GD: Tensor, groups: int, size: int) -> Tensor:
    if center_GD.dtype is not torch.float32:
        raise TypeError(f"center_GD must be float32, not {center_GD.dtype}")
    if center_GD.shape != (groups, size):
        raise ValueError(f"center_GD must be {(groups, size)}, not shape {tuple(center_GD.shape)}")
    return center_GD.contiguous()
