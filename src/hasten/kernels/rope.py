"""Rotary embedding fused with the append to the KV pages.

Legend: T rows, H query heads, G kv heads, D head size, R rotated dimensions, N pages, P page size.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.pages import page_kind

__all__ = ["rope_append"]


def _rows(name: str, value: Tensor) -> None:
    if value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, not {value.dtype}")
    dense = value.dim() == 3 and (value.numel() == 0 or value.stride()[1:] == (value.shape[2], 1))
    if not dense or value.stride(0) < 0:
        raise ValueError(
            f"{name} must be [T, heads, D] with contiguous heads, not shape {tuple(value.shape)}"
        )


def rope_append(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    slot_T: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    *,
    rotate_keys: bool = True,
    module: ModuleType | None = None,
) -> None:
    """Rotate ``q_THD`` and ``k_TGD`` in place and write keys and values into the pages at ``slot_T``.

    q, k, v: float32, rows may lie apart (slices of a fused projection), the heads of a row may not. cos_TR, sin_TR:
    float32 tables per row, both halves filled (`hasten.models.rope.Rope.tables`); R <= D even, dimension i pairs
    with i + R / 2. slot_T: int64, page * P + offset, distinct. Pages: `hasten.kernels.pages`, rounded to nearest even.
    ``rotate_keys=False`` caches keys unrotated. Source: RoFormer (arXiv 2104.09864) section 3.2.

    Raises TypeError for a wrong dtype and ValueError for shapes that do not fit or a slot outside the pool.
    """
    lib = native() if module is None else module
    for name, rows in (("q_THD", q_THD), ("k_TGD", k_TGD), ("v_TGD", v_TGD)):
        _rows(name, rows)
    count, heads, size = q_THD.shape
    groups = k_TGD.shape[1]
    if k_TGD.shape != v_TGD.shape or k_TGD.shape[0] != count or k_TGD.shape[2] != size:
        raise ValueError(
            f"q {tuple(q_THD.shape)}, k {tuple(k_TGD.shape)}, v {tuple(v_TGD.shape)} do not fit together"
        )
    for name, table in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
        if table.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, not {table.dtype}")
        if table.dim() != 2 or table.shape[0] != count or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{count}, R], not shape {tuple(table.shape)}")
    rotated = cos_TR.shape[1]
    if sin_TR.shape[1] != rotated or rotated % 2 or rotated > size:
        raise ValueError(
            f"cos_TR and sin_TR must have the same even width up to {size}, not {rotated}, {sin_TR.shape[1]}"
        )
    if slot_T.dtype is not torch.int64:
        raise TypeError(f"slot_T must be int64, not {slot_T.dtype}")
    if slot_T.shape != (count,) or not slot_T.is_contiguous():
        raise ValueError(f"slot_T must be contiguous [{count}], not shape {tuple(slot_T.shape)}")
    kind, tail = page_kind(k_NGPD, v_NGPD)
    if k_NGPD.shape != v_NGPD.shape or k_NGPD.dim() != 4 or k_NGPD.shape[1::2] != (groups, size + tail):
        raise ValueError(
            f"pages {tuple(k_NGPD.shape)}, {tuple(v_NGPD.shape)} do not hold [{groups} heads, size {size}]"
        )
    if not (k_NGPD.is_contiguous() and v_NGPD.is_contiguous()):
        raise ValueError("k_NGPD and v_NGPD must be contiguous")
    lib.rope_append(
        q_THD.data_ptr(),
        q_THD.stride(0),
        heads,
        k_TGD.data_ptr(),
        k_TGD.stride(0),
        v_TGD.data_ptr(),
        v_TGD.stride(0),
        groups,
        size,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        rotated,
        rotate_keys,
        slot_T.numpy(),
        k_NGPD.data_ptr(),
        v_NGPD.data_ptr(),
        k_NGPD.shape[0],
        k_NGPD.shape[2],
        kind,
    )
