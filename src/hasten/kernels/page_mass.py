"""Attention mass by page, and the pages that hold most of it (DELTA, arXiv 2510.09883, section 3).

A token's mass is the largest over the query heads of its softmax probability among all tokens that a row sees; a page's
mass is the sum over its tokens. A page is ``page`` consecutive tokens of a sequence, whatever the pool's pages hold.

Legend: R rows, H query heads, G kv heads, D head size, N pool pages, P pool page size, M pool pages of a row, C pages
of the longest row, K tokens of a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.packed import address
from hasten.kernels.pages import page_kind

__all__ = ["PageRule", "PageSelector", "page_choose", "page_mass", "page_selectors"]


@dataclass(frozen=True)
class PageRule:
    """Which pages are read: ``pages`` of ``page`` tokens each, the last ``recent`` among them and, with ``first``, the
    first one. Raises ValueError for numbers that make no sense."""

    page: int = 16
    pages: int = 64
    recent: int = 8
    first: bool = False

    def __post_init__(self) -> None:
        if self.page < 1 or self.pages < 1 or not 1 <= self.recent <= self.pages - self.first:
            raise ValueError(f"{self} is no choice of pages")

    @property
    def tokens(self) -> int:
        """Tokens that are read at most."""
        return self.page * self.pages


def page_mass(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    page: int,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Masses float32 [R, C] of the rows' pages; what lies past a row's last page is 0.

    q_RHD: rotated queries, float32. k_NGPD: cached keys, float32, bfloat16 or int8. table_RM: int32 page ids;
    length_R: int32 >= 1, tokens that the rows see. scale: of the products; softcap: their soft cap.
    Raises ValueError or TypeError for what does not fit.
    """
    mass_RC, _, _ = _weigh(
        q_RHD, k_NGPD, table_RM, length_R, PageRule(page, 1, 1), scale, softcap, choose=False
    )
    return mass_RC


def page_choose(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    rule: PageRule,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(index_RK int32 ascending, count_R int32): the tokens of the pages with the largest masses.

    Masses are lowered by 1e-7 per page before them, and of equal ones the earlier page is read. Arguments as in
    `page_mass`.
    """
    _, index_RK, count_R = _weigh(q_RHD, k_NGPD, table_RM, length_R, rule, scale, softcap, choose=True)
    return index_RK, count_R


def _weigh(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    rule: PageRule,
    scale: float,
    softcap: float | None,
    *,
    choose: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind, tail = page_kind(k_NGPD, k_NGPD)
    pool, kv_heads, page_size, width = k_NGPD.shape
    rows, heads, size = q_RHD.shape
    if width - tail != size or not k_NGPD.is_contiguous():
        raise ValueError(f"k_NGPD {tuple(k_NGPD.shape)} must be contiguous with heads of size {size}")
    q_RHD = q_RHD.contiguous()
    query = address("q_RHD", q_RHD, (rows, heads, size), torch.float32)
    table = address("table_RM", table_RM, (rows, table_RM.shape[1]), torch.int32)
    length = address("length_R", length_R, (rows,), torch.int32)
    most = -(-int(length_R.max()) // rule.page) if rows else 0
    mass_RC = torch.zeros(rows, most)
    index_RK = torch.empty((rows, rule.tokens if choose else 0), dtype=torch.int32)
    count_R = torch.empty(rows, dtype=torch.int32)
    native().page_mass(
        query,
        rows,
        heads,
        table,
        table_RM.shape[1],
        length,
        k_NGPD.data_ptr(),
        kind,
        pool,
        kv_heads,
        page_size,
        size,
        scale,
        softcap or 0.0,
        rule.page,
        rule.pages,
        rule.recent,
        rule.first,
        mass_RC.data_ptr(),
        index_RK.data_ptr() if choose else 0,
        count_R.data_ptr(),
    )
    return mass_RC, index_RK, count_R


class PageSelector:
    """What one layer does in decoding steps that run natively as a whole; see `page_selectors`."""

    __slots__ = ("_handle", "budget")

    def __init__(self, handle: Any, budget: int) -> None:
        self._handle, self.budget = handle, budget

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle


def page_selectors(
    watching: Sequence[bool], rule: PageRule, budget: int, *, heads: int, kv_heads: int, size: int
) -> list[PageSelector]:
    """Selectors of layers that share their choice: those of ``watching`` read densely and make it anew in each step,
    the others read it. Rows of up to ``budget`` tokens read densely everywhere. Raises ValueError for a budget below
    what is read."""
    if budget < rule.tokens:
        raise ValueError(f"budget = {budget}: at least the {rule.tokens} tokens that are read")
    handles = native().page_selectors(
        list(watching), heads, kv_heads, size, budget, rule.page, rule.pages, rule.recent, rule.first
    )
    return [PageSelector(handle, budget) for handle in handles]
