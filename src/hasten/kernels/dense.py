"""Dense linear layers over packed weights: float32 or bfloat16 weights, float32 activations and accumulation.

Weights are packed once in blocks of 16 output rows, [N, I, 16]: a block streams linearly whatever the row count, and
no horizontal sums are needed. One register-tiled kernel serves one row and a thousand.

Legend: T rows, I inputs, O outputs, N blocks of 16 outputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native

BLOCK = 16
"""Output rows that lie side by side in every packed layout."""


def pad_rows(rows: Tensor) -> Tensor:
    """[O, ...] as [N, 16, ...], the last block filled up with zeros."""
    outputs = rows.shape[0]
    blocks = -(-outputs // BLOCK)
    if blocks * BLOCK != outputs:
        rows = torch.cat([rows, rows.new_zeros(blocks * BLOCK - outputs, *rows.shape[1:])])
    return rows.reshape(blocks, BLOCK, *rows.shape[1:])


def pack_dense(weight_OI: Tensor) -> Tensor:
    """Pack a float32 or bfloat16 weight [O, I] as [N, I, 16] of the same dtype."""
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weight must be float32 or bfloat16, not {weight_OI.dtype}")
    if weight_OI.dim() != 2 or 0 in weight_OI.shape:
        raise ValueError(f"weight must be a non-empty [outputs, inputs], not {tuple(weight_OI.shape)}")
    return pad_rows(weight_OI).transpose(1, 2).contiguous()


def unpack_dense(packed_NI16: Tensor, outputs: int) -> Tensor:
    """The weight [O, I] of `pack_dense`, in its dtype."""
    blocks, inputs, _ = packed_NI16.shape
    return packed_NI16.transpose(1, 2).reshape(blocks * BLOCK, inputs)[:outputs].contiguous()


def check_rows(x_TI: Tensor, inputs: int) -> Tensor:
    """``x_TI`` fit for a kernel: float32 [T, I] with neighbouring columns. Raises naming the misfit."""
    if x_TI.dtype is not torch.float32:
        raise TypeError(f"x must be float32, not {x_TI.dtype}")
    if x_TI.dim() != 2 or x_TI.shape[1] != inputs:
        raise ValueError(f"x has shape {tuple(x_TI.shape)}; the layer takes [rows, {inputs}]")
    return x_TI if x_TI.is_contiguous() else x_TI.contiguous()


def check_bias(bias_P: Tensor | None, blocks: int) -> int:
    """The address of a bias padded to whole blocks (float32 [N * 16]), 0 for none."""
    if bias_P is None:
        return 0
    if bias_P.dtype is not torch.float32 or bias_P.numel() != blocks * BLOCK or not bias_P.is_contiguous():
        raise ValueError(f"bias must be contiguous float32 [{blocks * BLOCK}] (padded to whole blocks)")
    return bias_P.data_ptr()


def dense_linear(
    x_TI: Tensor,
    packed_NI16: Tensor,
    outputs: int,
    bias_P: Tensor | None = None,
    *,
    module: ModuleType | None = None,
) -> Tensor:
    """``x_TI @ W^T + bias``: float32 [T, O].

    packed_NI16: from `pack_dense`. bias_P: float32, padded with zeros to N * 16. module: a native module to use
    instead of the best one. Raises `TypeError` (dtype) or `ValueError` (shape) naming the argument.
    """
    blocks, inputs, _ = packed_NI16.shape
    if not packed_NI16.is_contiguous():
        raise ValueError("packed weights must be contiguous")
    if (outputs + BLOCK - 1) // BLOCK != blocks:
        raise ValueError(f"{blocks} packed blocks do not hold {outputs} outputs")
    bf16 = packed_NI16.dtype is torch.bfloat16
    if not bf16 and packed_NI16.dtype is not torch.float32:
        raise TypeError(f"packed weights must be float32 or bfloat16, not {packed_NI16.dtype}")
    x_TI = check_rows(x_TI, inputs)
    rows = x_TI.shape[0]
    y_TO = torch.empty(rows, outputs)
    if rows:
        (module or native()).dense_linear(
            x_TI.data_ptr(),
            packed_NI16.data_ptr(),
            check_bias(bias_P, blocks),
            y_TO.data_ptr(),
            rows,
            inputs,
            inputs,
            outputs,
            outputs,
            bf16,
        )
    return y_TO
