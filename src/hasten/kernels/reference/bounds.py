"""PyTorch reference of `hasten.kernels.bounds`; the legend is there."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.pages import dequantise


def boxes(k_LGD: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Boxes [blocks, G, 2, D] of the keys of one sequence, the last block partly filled."""
    parts = k_LGD.to(dtype).split(block)
    return torch.stack([torch.stack([part.amin(0), part.amax(0)], 1) for part in parts])


def bounds_append(k_TGD: Tensor, slot_T: Tensor, bounds: Tensor, page_size: int) -> None:
    block = page_size // bounds.shape[2]
    for key_GD, slot in zip(k_TGD.to(bounds.dtype), slot_T.tolist(), strict=True):
        box_G2D = bounds[slot // page_size, :, slot % page_size // block]
        if slot % block == 0:
            box_G2D.copy_(key_GD[:, None].expand_as(box_G2D))
        else:
            torch.minimum(box_G2D[:, 0], key_GD, out=box_G2D[:, 0])
            torch.maximum(box_G2D[:, 1], key_GD, out=box_G2D[:, 1])


def bounds_rebuild(k_NGPD: Tensor, block_W: Tensor, count_W: Tensor, bounds: Tensor) -> None:
    k_NGPD = dequantise(k_NGPD) if k_NGPD.dtype is torch.int8 else k_NGPD
    per = bounds.shape[2]
    block = k_NGPD.shape[2] // per
    for at, count in zip(block_W.tolist(), count_W.tolist(), strict=True):
        start = at % per * block
        keys_GCD = k_NGPD[at // per, :, start : start + count].to(bounds.dtype)
        bounds[at // per, :, at % per] = torch.stack([keys_GCD.amin(1), keys_GCD.amax(1)], 1)


def bounds_score(q_HD: Tensor, boxes_CG2D: Tensor) -> Tensor:
    """Scores float32 [G, blocks] of the boxes of one sequence."""
    size = q_HD.shape[1]
    q_GD = q_HD.view(boxes_CG2D.shape[1], -1, size).mean(1) * size**-0.5
    return (q_GD[None, :, None] * boxes_CG2D.float()).amax(2).sum(-1).T
