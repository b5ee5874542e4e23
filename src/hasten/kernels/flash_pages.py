"""FlashAttention over KV pages: the rows that a prompt's step brings, against the cached tokens of their sequences.

Legend: B sequences, H query heads, G kv heads, T rows of the step, D head size, N pages, P page size, M pages per
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from hasten.kernels.flash import Batch, call
from hasten.kernels.flash_terms import VERSION_2, Masking, Schedule
from hasten.kernels.native import native

__all__ = ["flash_pages"]


def flash_pages(
    q_THD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    table_BM: Tensor,
    first_B: Sequence[int],
    rows_B: Sequence[int],
    keys_B: Sequence[int],
    masking: Masking,
    out_THD: Tensor,
    schedule: Schedule = VERSION_2,
    *,
    module: ModuleType | None = None,
) -> None:
    """Attention of some sequences of a step over their KV pages, written to their rows of ``out_THD`` (float32).

    Sequence b brings the rows [first_B[b], first_B[b] + rows_B[b]) of ``q_THD`` (float32); they are the last of its
    keys_B[b] cached tokens, whose pages are ``table_BM[b]`` (int32). Pages: float32 or bfloat16 [N, G, P, D],
    contiguous. Raises TypeError for a wrong dtype and ValueError for shapes or indices that do not fit.
    """
    lib = native() if module is None else module
    for name, value in (("q_THD", q_THD), ("out_THD", out_THD)):
        if value.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, not {value.dtype}")
        if value.dim() != 3 or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous [T, H, D], not shape {tuple(value.shape)}")
    if q_THD.shape != out_THD.shape:
        raise ValueError(f"out_THD {tuple(out_THD.shape)} must have the shape of q_THD {tuple(q_THD.shape)}")
    if k_NGPD.dtype is not v_NGPD.dtype or k_NGPD.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pages must be float32 or bfloat16, not {k_NGPD.dtype} and {v_NGPD.dtype}")
    if k_NGPD.dim() != 4 or k_NGPD.shape != v_NGPD.shape or k_NGPD.shape[3] != q_THD.shape[2]:
        raise ValueError(
            f"k_NGPD {tuple(k_NGPD.shape)} and v_NGPD {tuple(v_NGPD.shape)} must be equal [N, G, P, {q_THD.shape[2]}]"
        )
    if not (k_NGPD.is_contiguous() and v_NGPD.is_contiguous()):
        raise ValueError("k_NGPD and v_NGPD must be contiguous")
    pages, groups, page, size = k_NGPD.shape
    heads = q_THD.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} kv heads evenly")
    if table_BM.dtype is not torch.int32 or table_BM.dim() != 2 or not table_BM.is_contiguous():
        raise TypeError("table_BM must be contiguous int32 [B, M]")
    first, rows, keys = (np.asarray(x, np.int64) for x in (first_B, rows_B, keys_B))
    width = table_BM.shape[1]
    if len(rows) and ((first < 0).any() or (rows < 0).any() or (first + rows > q_THD.shape[0]).any()):
        raise ValueError("first_B and rows_B name rows outside q_THD")
    if len(keys) and ((keys < 0).any() or int(keys.max()) > width * page):
        raise ValueError(f"keys_B exceeds the {width} pages of {page} tokens in table_BM")
    used = np.arange(width) < -(-keys // page)[:, None]
    named = table_BM.numpy()[used]
    if named.size and (named.min() < 0 or named.max() >= pages):
        raise ValueError(f"table_BM names a page outside the pool of {pages}")
    zero = np.zeros_like(first)
    sequences = np.stack(
        [first * heads * size, zero, zero, first * heads * size, first * heads, rows, keys], 1
    )
    lse = torch.empty(q_THD.shape[:2])
    total = None if schedule.deferred else torch.empty_like(lse)
    batch = Batch(np.ascontiguousarray(sequences, np.int64), heads, groups, size)
    where = {
        "lse_stride": (heads, 1),
        "table": table_BM.data_ptr(),
        "table_width": width,
        "page": page,
        "k_stride": (0, 0),
        "v_stride": (0, 0),
    }
    call(lib, batch, q_THD, k_NGPD, v_NGPD, masking, schedule, out_THD, lse, total, **where)
