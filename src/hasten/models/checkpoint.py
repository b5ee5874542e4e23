"""Checkpoints: where a decoder's weights, tokenizer and shape come from, behind one interface.

Legend: O outputs, I inputs, B bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantBlocks:
    """Raw quantised rows as a checkpoint stores them: ``data`` uint8 [O, bytes per row], ggml type name."""

    kind: str  # "Q4_1", "Q8_0", ...
    data_OB: Tensor
    inputs: int


@dataclass(frozen=True)
class LinearSource(ABC):
    """Where a packed layer comes from.

    name: the module's path, e.g. ``layers.3.qkv_proj``.
    blocks: the raw quantised parts in row order (one per fused checkpoint tensor), or None when any part is
        plain floating point.
    """

    name: str
    outputs: int
    inputs: int
    blocks: tuple[QuantBlocks, ...] | None
    bias_O: Tensor | None

    @abstractmethod
    def dense(self) -> Tensor:
        """The exact float32 weight [O, I], dequantised if the checkpoint is quantised."""
