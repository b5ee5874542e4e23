"""Packed linear layers that run on native kernels: what dense and quantised storage have in common.

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UnsupportedError
from hasten.kernels.packed import Packed, stack
from hasten.weights.format import PackedLinear


class KernelLinear(PackedLinear):
    """A layer whose buffers a native kernel reads. The kernel's handle is made on first use, and again after the
    buffers have moved (``to``, pickling, ``copy.deepcopy``).

    exact: the layer holds the checkpoint's own numbers, none of them rounded again.
    """

    exact: bool = False
    _kernel: Packed | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self._kernel = None

    @abstractmethod
    def make_kernel(self) -> Packed:
        """The native layer over this module's buffers. Raises when they do not fit each other."""

    def kernel(self) -> Packed:
        """The native layer, made when needed."""
        found = self._kernel
        if found is None:
            found = self._kernel = self.make_kernel()
        return found

    def forward(self, x_TI: Tensor) -> Tensor:
        """float32 [..., I] -> float32 [..., O]. There is no backward pass: a gradient that would be lost raises."""
        if x_TI.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                "a packed linear layer has no backward pass; train the plain model (load_decoder without pack) or "
                "run under torch.no_grad()"
            )
        kernel = self._kernel or self.kernel()
        if x_TI.dim() == 2:
            return kernel(x_TI)
        return kernel(x_TI.reshape(-1, x_TI.shape[-1])).view(*x_TI.shape[:-1], self.outputs)

    def weight_bytes(self) -> int:
        """Bytes of all buffers but the bias, what fills up the last block and chunk included."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if not name.endswith("bias_P"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kernel = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}


class StackedLinear(KernelLinear):
    """Layers that share their input, outputs one after the other: parts of a fused linear stored in different ways."""

    def __init__(self, parts: Sequence[KernelLinear]) -> None:
        super().__init__(parts[0].inputs, sum(part.outputs for part in parts))
        self.parts = nn.ModuleList(parts)

    def make_kernel(self) -> Packed:
        return stack([part.kernel() for part in self.parts])  # type: ignore[operator]

    def dequantize(self) -> Tensor:
        """The parts' weights, one under the other."""
        return torch.cat([part.dequantize() for part in self.parts])  # type: ignore[operator]
