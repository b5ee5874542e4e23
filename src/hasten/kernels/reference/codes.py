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
    """Codes [..., D] as uint8 [..., D / 4]: coordinate c is bits 2 (c % 4) and up of byte c // 4."""
    four = codes.reshape(*codes.shape[:-1], -1, 4)
    return (four << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int64 [..., D]."""
    return ((packed.long().unsqueeze(-1) >> torch.tensor([0, 2, 4, 6])) & 3).flatten(-2)


def block_width(page_size: int) -> int:
    """W of the sidecar's layout."""
    return next(width for width in (32, 16, 1) if page_size % width == 0)


def blocked(packed_NGPB: Tensor) -> Tensor:
    """Codes in token order as the sidecar holds them: transposed in blocks of W tokens, same shape."""
    pages, heads, page_size, size = packed_NGPB.shape
    width = block_width(page_size)
    blocks = packed_NGPB.reshape(pages, heads, page_size // width, width, size)
    return blocks.transpose(-1, -2).reshape(packed_NGPB.shape).contiguous()


def token_major(sidecar_NGPB: Tensor) -> Tensor:
    """The inverse of `blocked`."""
    pages, heads, page_size, size = sidecar_NGPB.shape
    width = block_width(page_size)
    blocks = sidecar_NGPB.reshape(pages, heads, page_size // width, size, width)
    return blocks.transpose(-1, -2).reshape(sidecar_NGPB.shape).contiguous()


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
