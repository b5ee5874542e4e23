"""PyTorch reference of `hasten.kernels.codes`; the legend is there."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of +1 and -1, float64 [size, size]; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def bucketise(x: Tensor, cut: float) -> Tensor:
    """Integer codes 0..3 of x H, same shape as x (last axis D)."""
    size = x.shape[-1]
    y = x.double() @ hadamard(size) / size**0.5
    return (y > -cut).long() + (y > 0).long() + (y > cut).long()


def pack(codes: Tensor) -> Tensor:
    """Codes [..., D] as uint8 [..., 2, D / 8]: high bits, low bits; coordinate c is bit c % 8 of byte c // 8."""
    bits = torch.stack([codes >> 1, codes & 1], dim=-2)
    bits = bits.reshape(*bits.shape[:-1], -1, 8)
    return (bits << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack(planes: Tensor) -> Tensor:
    """The inverse of `pack`: int64 [..., D]."""
    bits = (planes.long().unsqueeze(-1) >> torch.arange(8)) & 1
    bits = bits.flatten(-2)
    return 2 * bits[..., 0, :] + bits[..., 1, :]


def hadamard_distance(query_RHD: Tensor, key_RLGD: Tensor, *, corrected: bool = True) -> Tensor:
    """int64 [R, H, L] from integer codes."""
    group = query_RHD.shape[1] // key_RLGD.shape[2]
    key_RHLD = key_RLGD.repeat_interleave(group, dim=2).transpose(1, 2)
    if corrected:
        return (query_RHD.unsqueeze(2) - key_RHLD).abs().sum(-1)
    return (query_RHD.unsqueeze(2) ^ key_RHLD).sum(-1)


def hadamard_select(distance_XL: Tensor, budget: int) -> list[list[int]]:
    """Ascending chosen tokens per choice: the last token and the budget - 1 nearest others, recent ties first."""
    chosen = []
    for row_L in distance_XL.tolist():
        others = sorted(range(len(row_L) - 1), key=lambda j: (row_L[j], -j))[: budget - 1]
        chosen.append(sorted([*others, len(row_L) - 1]))
    return chosen
