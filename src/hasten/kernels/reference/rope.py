"""PyTorch reference of `hasten.kernels.rope`.

Legend: T rows, H query heads, G kv heads, D head size, R rotated dimensions, N pages, P page size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.pages import quantise


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Half-split rotation of the first R dimensions of every head."""
    size = cos_TR.shape[-1]
    left, right = x_THD[..., :size].chunk(2, dim=-1)
    turned = x_THD[..., :size] * cos_TR[:, None] + torch.cat((-right, left), -1) * sin_TR[:, None]
    return torch.cat((turned, x_THD[..., size:]), -1)


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
) -> None:
    """See `hasten.kernels.rope.rope_append`."""
    page = k_NGPD.shape[2]
    q_THD.copy_(rotate(q_THD, cos_TR, sin_TR))
    if rotate_keys:
        k_TGD.copy_(rotate(k_TGD, cos_TR, sin_TR))
    for pages, x_TGD in ((k_NGPD, k_TGD), (v_NGPD, v_TGD)):
        stored = quantise(x_TGD) if pages.dtype is torch.int8 else x_TGD.to(pages.dtype)
        pages[slot_T // page, :, slot_T % page] = stored
