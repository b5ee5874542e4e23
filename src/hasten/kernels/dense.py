"""Dense linear layers over packed weights: float32 or bfloat16 weights, float32 activations and accumulation.

Weights are packed once in blocks of 16 output rows, [N, I, 16]: a block streams linearly whatever the row count, and
no horizontal sums are needed. One register-tiled kernel serves one row and a thousand.

Legend: I inputs, O outputs, N blocks of 16 outputs, P outputs filled up to whole blocks.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.packed import BLOCK, Packed, address, pad_rows


def pack_dense(weight_OI: Tensor) -> Tensor:
    """Pack a float32 or bfloat16 weight [O, I] as [N, I, 16] of the same dtype."""
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weight must be float32 or bfloat16, not {weight_OI.dtype}")
    if weight_OI.dim() != 2 or 0 in weight_OI.shape:
        raise ValueError(f"weight must be a non-empty [outputs, inputs], not {tuple(weight_OI.shape)}")
    return pad_rows(weight_OI).transpose(1, 2).contiguous()


def unpack_dense(packed_NI16: Tensor, outputs: int) -> Tensor:
    """The weight [O, I] that `pack_dense` packed, in its dtype."""
    return packed_NI16.transpose(1, 2).flatten(0, 1)[:outputs].contiguous()


def dense(
    packed_NI16: Tensor, outputs: int, bias_P: Tensor | None = None, *, module: ModuleType | None = None
) -> Packed:
    """The layer of a packed weight. bias_P: float32, filled up to N * 16.

    module: a native module of another level than the best (tests). Raises `TypeError` or `ValueError` naming the
    argument that does not fit.
    """
    blocks, inputs, _ = packed_NI16.shape
    if -(-outputs // BLOCK) != blocks:
        raise ValueError(f"{blocks} packed blocks do not hold {outputs} outputs")
    lib = native() if module is None else module
    weight = address("packed weight", packed_NI16, (blocks, inputs, BLOCK), torch.float32, torch.bfloat16)
    bias = address("bias", bias_P, (blocks * BLOCK,), torch.float32)
    handle = lib.packed_dense(weight, bias, inputs, outputs, packed_NI16.dtype is torch.bfloat16)
    return Packed(lib, handle, inputs, outputs, (packed_NI16, bias_P))
