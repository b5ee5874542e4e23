"""Packed linear layers as the native library sees them: a handle, called with rows of float32.

The handle is built once; a call passes two addresses. Layers are called some hundred times per token, so that
microseconds count here.

Legend: T rows, I inputs, O outputs, N blocks of 16 outputs, P outputs filled up to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BLOCK = 16
"""Output rows that lie side by side in every packed layout."""


class Packed:
    """A native linear layer. Calling it multiplies: float32 [T, I] -> float32 [T, O].

    keep: tensors and handles whose memory the native layer reads; they live as long as this object.
    """

    __slots__ = ("_forward", "handle", "inputs", "keep", "module", "outputs")

    def __init__(
        self, module: ModuleType, handle: Any, inputs: int, outputs: int, keep: Sequence[Any]
    ) -> None:
        self.module, self.handle, self.inputs, self.outputs, self.keep = module, handle, inputs, outputs, keep
        self._forward = module.packed_forward

    def __call__(self, x_TI: Tensor) -> Tensor:
        """``x_TI @ W^T + bias``. Raises `TypeError` (dtype) or `ValueError` (shape)."""
        if x_TI.dtype is not torch.float32:
            raise TypeError(f"x must be float32, not {x_TI.dtype}")
        shape = x_TI.shape
        if len(shape) != 2 or shape[1] != self.inputs:
            raise ValueError(f"x has shape {tuple(shape)}; the layer takes [rows, {self.inputs}]")
        if not x_TI.is_contiguous():
            x_TI = x_TI.contiguous()
        rows = shape[0]
        y_TO = torch.empty(rows, self.outputs)
        self._forward(self.handle, x_TI.data_ptr(), rows, y_TO.data_ptr())
        return y_TO

    def row(self, output: int) -> Tensor:
        """The weights of one output, float32 [I], dequantised. Raises ValueError where the layer cannot tell."""
        y_I = torch.empty(self.inputs)
        self.module.packed_row(self.handle, output, y_I.data_ptr())
        return y_I


def stack(parts: Sequence[Packed]) -> Packed:
    """One layer of several that share their input, outputs one after the other."""
    if not parts:
        raise ValueError("a stack needs at least one part")
    module = parts[0].module
    handle = module.packed_stack([part.handle for part in parts])
    return Packed(module, handle, parts[0].inputs, sum(part.outputs for part in parts), tuple(parts))


def pad_rows(rows: Tensor) -> Tensor:
    """[O, ...] as [N, 16, ...], the last block filled up with zeros."""
    outputs = rows.shape[0]
    blocks = -(-outputs // BLOCK)
    if blocks * BLOCK != outputs:
        rows = torch.cat([rows, rows.new_zeros(blocks * BLOCK - outputs, *rows.shape[1:])])
    return rows.reshape(blocks, BLOCK, *rows.shape[1:])


def address(name: str, value: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> int:
    """The address of an optional tensor (0 for None). Raises naming it when it is not contiguous of ``shape``."""
    if value is None:
        return 0
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {value.dtype}")
    if tuple(value.shape) != shape or not value.is_contiguous() or value.device.type != "cpu":
        raise ValueError(f"{name} must be contiguous {list(shape)} on the CPU, not {list(value.shape)}")
    return value.data_ptr()
