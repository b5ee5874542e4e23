"""Weights stored as plain float32 or bfloat16: the reference format, and the baseline of every other one.

Legend: I inputs, O outputs, N blocks of 16 outputs, P outputs filled up to whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.errors import SettingError
from hasten.kernels.dense import dense, pack_dense, unpack_dense
from hasten.kernels.packed import Packed, pad_rows
from hasten.weights.format import LinearSource, WeightFormat
from hasten.weights.packed import KernelLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DenseLinear(KernelLinear):
    """A linear layer of packed float32 or bfloat16 weights; activations and accumulation are float32.

    weight_OI: float32; stored in ``dtype``, rounded to nearest even. bias_O: float32 or None.
    """

    packed_NI16: Tensor
    bias_P: Tensor | None

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        outputs, inputs = weight_OI.shape
        super().__init__(inputs, outputs)
        self.register_buffer("packed_NI16", pack_dense(weight_OI.detach().to(dtype)))
        self.register_buffer(
            "bias_P", None if bias_O is None else pad_rows(bias_O.detach().float()).flatten()
        )

    def make_kernel(self) -> Packed:
        return dense(self.packed_NI16, self.outputs, self.bias_P)

    def dequantize(self) -> Tensor:
        """The stored weight, float32 [O, I]."""
        return unpack_dense(self.packed_NI16, self.outputs).float()

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, {str(self.packed_NI16.dtype).removeprefix('torch.')}"


class DenseFormat(WeightFormat):
    """Every linear layer in ``dtype``: ``"float32"`` (exact) or ``"bfloat16"`` (weights rounded, half the bytes)."""

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise SettingError(f"dtype = {dtype!r}: dense weights are stored as {' or '.join(DTYPES)}")
        self.dtype = dtype

    def pack(self, source: LinearSource) -> DenseLinear:
        """Pack the exact weight of ``source``, rounded to ``dtype``."""
        return DenseLinear(source.dense(), source.bias_O, DTYPES[self.dtype])
