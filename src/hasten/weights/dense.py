"""Weights stored as plain float32 or bfloat16: the reference format, and the baseline of every other one.

Legend: T rows, I inputs, O outputs, N blocks of 16 outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.dense import dense_linear, pack_dense, pad_rows, unpack_dense
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., I] as [T, I]. Packed layers have no backward pass: raises rather than lose a gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "a packed linear layer has no backward pass; train the plain model (load_decoder without pack), "
            "or run under torch.no_grad()"
        )
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class DenseLinear(PackedLinear):
    """A linear layer of packed float32 or bfloat16 weights; activations and accumulation are float32.

    weight_OI: float32; stored in ``dtype``, rounded to nearest even. bias_O: float32 or None.
    """

    packed_NI16: Tensor
    bias_P: Tensor | None

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = weight_OI.shape
        self.register_buffer("packed_NI16", pack_dense(weight_OI.detach().to(dtype)))
        self.register_buffer(
            "bias_P", None if bias_O is None else pad_rows(bias_O.detach().float()).flatten()
        )

    def forward(self, x_TI: Tensor) -> Tensor:
        """float32 [..., I] -> float32 [..., O]."""
        y_TO = dense_linear(as_rows(x_TI), self.packed_NI16, self.outputs, self.bias_P)
        return y_TO if x_TI.dim() == 2 else y_TO.view(*x_TI.shape[:-1], self.outputs)

    def dequantize(self) -> Tensor:
        """The stored weight, float32 [O, I]."""
        return unpack_dense(self.packed_NI16, self.outputs).float()

    def weight_bytes(self) -> int:
        """Bytes of the packed weights, rows that fill up the last block included."""
        return self.packed_NI16.nbytes

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
