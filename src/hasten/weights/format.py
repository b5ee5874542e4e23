"""Slot ``weight_format``: how a linear layer stores and multiplies its weights.

A format turns the weight of one linear layer (possibly several that share an input, concatenated by rows:
q/k/v, gate/up) into a `PackedLinear`, once, at load. The packed layer is an ``nn.Module`` that stands where
the model's ``nn.Linear`` stood; it picks its kernel by row count (GEMV, few rows, many rows).

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from hasten.models.checkpoint import LinearSource, QuantBlocks

__all__ = ["LinearSource", "PackedLinear", "QuantBlocks", "WeightFormat"]


class PackedLinear(nn.Module, ABC):
    """A linear layer in a storage format. ``forward`` takes and returns float32."""

    inputs: int
    outputs: int

    @abstractmethod
    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias, float32, any number of rows (0 included)."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I] that ``forward`` multiplies by."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights (with scales) that one forward pass of one row reads."""


class WeightFormat(ABC):
    """Packs linear layers. One instance per loaded model."""

    def begin(self, model: object) -> None:
        """Called once with the `hasten.models.decoder.Decoder` before packing (calibrating formats run here)."""

    @abstractmethod
    def pack(self, source: LinearSource) -> PackedLinear:
        """Return the packed layer. Raises `UnsupportedError` if the shape does not fit the format."""

    def embedding(self, name: str) -> bool:
        """Whether ``pack`` should also be asked for the LM head (``lm_head``)."""
        return True
