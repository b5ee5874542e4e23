"""Blocks of keys and the boxes around them (ReSA, arXiv 2506.04108): append, rebuild, choose the most promising blocks.

A block is B consecutive tokens of a sequence; B divides the page size. The sidecar [N, G, P / B, 2, D] holds the
smallest and the largest value of every key coordinate of a block, float32 or bfloat16 like the pages (keys are rounded
first, so that boxes in bfloat16 bound what bfloat16 pages hold). The score of a block is the most that the product of
the query, averaged over the query heads of a kv head and scaled by D^-1/2, can be with any key in the box.

Legend: T rows, R decode rows, H query heads, G kv heads, D head size, N pages, P page size, M pages of a row, B block,
W blocks to rebuild, K tokens of a choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.packed import address
from hasten.kernels.pages import page_kind

__all__ = ["BoundsSelector", "KeepRule", "bounds_append", "bounds_choose", "bounds_rebuild"]


@dataclass(frozen=True)
class KeepRule:
    """How many of a row's blocks are kept: ``ratio`` of them, rounded up, and at least ``least``; always the last
    ``local`` ones. Raises ValueError for numbers that make no sense."""

    ratio: float
    least: int
    local: int

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {self.ratio}")
        if not 0 <= self.local <= self.least or self.least < 1:
            raise ValueError(
                f"least must be at least 1 and not below local, not {self.least} and {self.local}"
            )

    def kept(self, blocks: int) -> int:
        """Blocks that a row of ``blocks`` blocks reads."""
        return min(blocks, max(math.ceil(blocks * self.ratio - 1e-9), self.least))

    @property
    def whole(self) -> int | None:
        """Rows of up to so many blocks read all of them; None: every row does."""
        if self.ratio == 1:
            return None
        blocks = max(self.least, math.floor(1 / (1 - self.ratio)) - 2, 0)
        while self.kept(blocks + 1) == blocks + 1:
            blocks += 1
        return blocks


def _pool(bounds: Tensor, page_size: int) -> tuple[int, bool, int, int, int, int, int]:
    """What native kernels want to know of a sidecar: address, bfloat16?, N, G, P, B, D."""
    if bounds.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"bounds must be float32 or bfloat16, not {bounds.dtype}")
    if bounds.dim() != 5 or bounds.shape[3] != 2 or not bounds.is_contiguous():
        raise ValueError(f"bounds must be contiguous [N, G, P / B, 2, D], not {tuple(bounds.shape)}")
    pages, kv_heads, blocks, _, size = bounds.shape
    if blocks == 0 or page_size % blocks:
        raise ValueError(f"bounds hold {blocks} blocks a page, which do not divide its {page_size} tokens")
    bf16 = bounds.dtype is torch.bfloat16
    return bounds.data_ptr(), bf16, pages, kv_heads, page_size, page_size // blocks, size


def bounds_append(k_TGD: Tensor, slot_T: Tensor, bounds: Tensor, page_size: int) -> None:
    """Widen the boxes by keys float32 [T, G, D] cached at ``slot_T`` (int64); a block's first token begins its box.

    Rows of one block come in the order of their slots. Raises ValueError or TypeError for what does not fit.
    """
    pool = _pool(bounds, page_size)
    rows, k_TGD = k_TGD.shape[0], k_TGD.contiguous()
    key = address("k_TGD", k_TGD, (rows, pool[3], pool[6]), torch.float32)
    slot = address("slot_T", slot_T, (rows,), torch.int64)
    native().bounds_append(key, rows, slot, *pool)


def bounds_rebuild(k_NGPD: Tensor, block_W: Tensor, count_W: Tensor, bounds: Tensor) -> None:
    """Make the boxes of blocks ``block_W`` (int64, page * P / B + block of the page) anew from the pages.

    count_W: int32, the tokens that each block holds (1..B). Pages may be float32, bfloat16 or int8.
    """
    pool = _pool(bounds, k_NGPD.shape[2])
    kind, tail = page_kind(k_NGPD, k_NGPD)
    if tuple(k_NGPD.shape) != (*pool[2:5], pool[6] + tail) or not k_NGPD.is_contiguous():
        raise ValueError(
            f"k_NGPD {tuple(k_NGPD.shape)} must be contiguous and fit bounds {tuple(bounds.shape)}"
        )
    blocks = block_W.shape[0]
    which = address("block_W", block_W, (blocks,), torch.int64)
    count = address("count_W", count_W, (blocks,), torch.int32)
    native().bounds_rebuild(k_NGPD.data_ptr(), kind, which, count, blocks, *pool)


def bounds_choose(
    q_RHD: Tensor, table_RM: Tensor, length_R: Tensor, bounds: Tensor, page_size: int, rule: KeepRule
) -> tuple[Tensor, Tensor]:
    """(index_RGK int32 ascending, count_RG int32): the tokens of the blocks with the highest scores, by kv head.

    q_RHD: rotated queries, float32. table_RM: int32 page ids; length_R: int32 >= 1, tokens that the rows see. Equal
    scores: the later block wins.
    """
    pool = _pool(bounds, page_size)
    kv_heads, block, size = pool[3], pool[5], pool[6]
    rows, heads = q_RHD.shape[:2]
    q_RHD = q_RHD.contiguous()
    query = address("q_RHD", q_RHD, (rows, heads, size), torch.float32)
    width = table_RM.shape[1]
    table = address("table_RM", table_RM, (rows, width), torch.int32)
    length = address("length_R", length_R, (rows,), torch.int32)
    longest = int(length_R.max()) if rows else 0
    most = rule.kept(-(-longest // block)) * block
    index_RGK = torch.empty((rows, kv_heads, most), dtype=torch.int32)
    count_RG = torch.empty((rows, kv_heads), dtype=torch.int32)
    native().bounds_choose(
        query,
        rows,
        heads,
        table,
        width,
        length,
        rule.ratio,
        rule.least,
        rule.local,
        most,
        index_RGK.data_ptr(),
        count_RG.data_ptr(),
        *pool,
    )
    return index_RGK, count_RG


class BoundsSelector:
    """`bounds_append` and `bounds_choose` of one layer, for decoding steps that run natively as a whole.

    bounds: the layer's sidecar. Raises ValueError for what does not fit, and for a rule that keeps every block.
    """

    __slots__ = ("_handle", "budget", "keep")

    def __init__(self, bounds: Tensor, page_size: int, rule: KeepRule, *, heads: int) -> None:
        pool = _pool(bounds, page_size)
        whole = rule.whole
        if whole is None:
            raise ValueError("a ratio of 1 reads every block: there is nothing to select")
        self.budget, self.keep = whole * pool[5], bounds
        self._handle: Any = native().bounds_selector(
            heads, self.budget, rule.ratio, rule.least, rule.local, *pool
        )

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle
