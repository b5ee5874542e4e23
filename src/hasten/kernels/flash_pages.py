"""FlashAttention over KV pages: the rows that a prompt's step brings, against the cached tokens of their sequences.

Legend: B sequences, H query heads, G kv heads, T rows of the step, D head size, N pages, P page size, M pages per
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.kernels.flash import Batch, describe
from hasten.kernels.flash_terms import VERSION_2, Masking, Schedule
from hasten.kernels.native import native

__all__ = ["PagesWork", "flash_pages"]

Ints = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PagesWork:
    """Which rows of a step read which pages; made once per step, checked once per kind of layer.

    Sequence b brings the rows [first_B[b], first_B[b] + rows_B[b]); they are the last of its keys_B[b] cached tokens,
    whose pages are ``table_BM[b]`` (int32, contiguous).
    """

    table_BM: Tensor
    first_B: Ints
    rows_B: Ints
    keys_B: Ints
    cache: dict[Any, dict[str, Any]] = field(default_factory=dict, repr=False)

    def batch(self, rows: int, heads: int, groups: int, size: int, page: int) -> tuple[Batch, int]:
        """Where the sequences lie, and the highest page. `ValueError` for rows, tokens or pages that do not exist."""
        table = self.table_BM
        if table.dtype is not torch.int32 or table.dim() != 2 or not table.is_contiguous():
            raise TypeError(
                f"table_BM must be contiguous int32 [B, M], not {table.dtype} {tuple(table.shape)}"
            )
        first, count, keys = (np.asarray(x, np.int64) for x in (self.first_B, self.rows_B, self.keys_B))
        if not len(first) == len(count) == len(keys) == len(table):
            raise ValueError("table_BM, first_B, rows_B and keys_B differ in length")
        width = table.shape[1]
        if (first < 0).any() or (count < 0).any() or (first + count > rows).any():
            raise ValueError(f"first_B and rows_B name rows outside the {rows} of q_THD")
        if (keys < 0).any() or (keys > width * page).any():
            raise ValueError(f"keys_B exceeds the {width} pages of {page} tokens in table_BM")
        named = table.numpy()[np.arange(width) < -(-keys // page)[:, None]]
        if named.min(initial=0) < 0:
            raise ValueError("table_BM names a page below 0")
        zero, row = np.zeros_like(first), first * heads * size
        sequences = np.stack([row, zero, zero, row, first * heads, count, keys], 1)
        return Batch(np.ascontiguousarray(sequences), heads, groups, size), int(named.max(initial=-1))


def flash_pages(
    q_THD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    work: PagesWork,
    masking: Masking,
    out_THD: Tensor,
    schedule: Schedule = VERSION_2,
    *,
    module: ModuleType | None = None,
) -> None:
    """Attention of the sequences of ``work`` over their KV pages, written to their rows of ``out_THD``.

    q_THD, out_THD: float32, contiguous. Pages: float32 or bfloat16 [N, G, P, D], contiguous; H a multiple of G.
    ``masking`` may hold a scale, limits and a soft-cap.

    Raises TypeError for a wrong dtype and ValueError for shapes or indices that do not fit.
    """
    lib = native() if module is None else module
    for name, value in (("q_THD", q_THD), ("out_THD", out_THD)):
        if value.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, not {value.dtype}")
        if value.dim() != 3 or not value.is_contiguous() or value.shape != q_THD.shape:
            raise ValueError(
                f"{name} must be contiguous [T, H, D]; q_THD is {tuple(q_THD.shape)}, out_THD {tuple(out_THD.shape)}"
            )
    if k_NGPD.dtype is not v_NGPD.dtype or k_NGPD.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pages must be float32 or bfloat16, not {k_NGPD.dtype} and {v_NGPD.dtype}")
    rows, heads, size = q_THD.shape
    if k_NGPD.dim() != 4 or k_NGPD.shape != v_NGPD.shape or k_NGPD.shape[3] != size:
        raise ValueError(
            f"k_NGPD {tuple(k_NGPD.shape)} and v_NGPD {tuple(v_NGPD.shape)} must be equal [N, G, P, {size}]"
        )
    if not (k_NGPD.is_contiguous() and v_NGPD.is_contiguous()):
        raise ValueError("k_NGPD and v_NGPD must be contiguous")
    pages, groups, page, _ = k_NGPD.shape
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} kv heads evenly")
    key = (
        rows,
        heads,
        groups,
        size,
        page,
        masking.scale,
        masking.left,
        masking.right,
        masking.softcap,
        schedule,
    )
    known = work.cache.get(key)
    if known is None:
        if masking != Masking(masking.scale, masking.left, masking.right, masking.softcap):
            raise ValueError("pages are read with a scale, limits and a soft-cap only")
        batch, top = work.batch(rows, heads, groups, size, page)
        known = work.cache[key] = describe(batch, masking, schedule) | {
            "q_stride": (heads * size, size),
            "k_stride": (0, 0),
            "v_stride": (0, 0),
            "out_stride": (heads * size, size),
            "lse_stride": (heads, 1),
            "table": work.table_BM.data_ptr(),
            "table_width": work.table_BM.shape[1],
            "page": page,
            "top_page": top,
        }
    if known["top_page"] >= pages:
        raise ValueError(f"table_BM names page {known['top_page']}, outside the pool of {pages}")
    stats = torch.empty(2, rows, heads)  # of no use here
    at = stats.data_ptr()
    lib.flash_forward(
        known
        | {
            "q": q_THD.data_ptr(),
            "k": k_NGPD.data_ptr(),
            "v": v_NGPD.data_ptr(),
            "kv_bf16": k_NGPD.dtype is torch.bfloat16,
            "out": out_THD.data_ptr(),
            "lse": at,
            "sum": at + 4 * rows * heads,
        }
    )
