"""Linear layers on the MARLIN kernels: dense 4 bit codes and 2:4 sparse ones.

Legend: O outputs, I inputs, G groups, N blocks of 16 outputs, C chunks of 32 inputs, P outputs of whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.kernels.affine import CHUNK, HALF_KIND, OFFSET, Numbers, group_count
from hasten.kernels.marlin import (
    GROUP_SIZES,
    ZERO_CODE,
    SparseWeight,
    dequantize_sparse,
    marlin,
    marlin_sparse,
    pack_two_of_four,
)
from hasten.kernels.packed import Packed, pad_rows
from hasten.weights.affine import AffineLinear, store_scale
from hasten.weights.gptq_grid import UniformGrid
from hasten.weights.gptq_sweep import QuantizedWeight
from hasten.weights.packed import KernelLinear


class MarlinLinear(AffineLinear):
    """Dense symmetric 4 bit codes: `AffineLinear`'s storage, MARLIN's kernels.

    Raises `UnsupportedError` where those do not fit the codes.
    """

    def make_kernel(self) -> Packed:
        try:
            return marlin(self.weight)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None


class SparseMarlinLinear(KernelLinear):
    """2:4 sparse symmetric 4 bit codes, three bits per weight.

    codes_OI: uint8, at most two of each four consecutive inputs other than 8. scale_OG: float32, stored as float16
    where that is exact. bias_O: float32 or None. Raises `UnsupportedError` for weights that are not 2:4 sparse.
    """

    words: Tensor
    scale: Tensor
    bias_P: Tensor | None

    def __init__(
        self, codes_OI: Tensor, scale_OG: Tensor, group_size: int, bias_O: Tensor | None = None
    ) -> None:
        try:
            words = pack_two_of_four(codes_OI)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(str(error)) from None
        super().__init__(codes_OI.shape[1], codes_OI.shape[0])
        self.group_size = -(-min(group_size, self.inputs) // CHUNK) * CHUNK
        shape = (self.outputs, -(-self.inputs // self.group_size))
        if tuple(scale_OG.shape) != shape or not bool(torch.isfinite(scale_OG).all()):
            raise UnsupportedError(f"scale must be finite {list(shape)}, not {list(scale_OG.shape)}")
        scale = store_scale(scale_OG, group_count(self.inputs, self.group_size))
        self._kind = scale.kind
        self.register_buffer("words", words)
        self.register_buffer("scale", scale.value)
        self.register_buffer(
            "bias_P", None if bias_O is None else pad_rows(bias_O.detach().float()).flatten()
        )

    @property
    def weight(self) -> SparseWeight:
        """The packed weight over this module's buffers."""
        scale = Numbers(self._kind, self.scale)
        return SparseWeight(self.inputs, self.outputs, self.group_size, self.words, scale, self.bias_P)

    def make_kernel(self) -> Packed:
        try:
            return marlin_sparse(self.weight)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I], zeros where nothing is kept."""
        return dequantize_sparse(self.weight)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, 4 bits, 2:4 sparse, groups of {self.group_size}"


def pack_marlin(
    weight: QuantizedWeight, bias_O: Tensor | None, activations: str, sparse: bool
) -> MarlinLinear | SparseMarlinLinear:
    """The layer of a weight on the symmetric 4 bit grid. Raises `UnsupportedError` for other weights."""
    grid = weight.grid
    if not isinstance(grid, UniformGrid) or grid.bits != 4 or not bool((weight.b_OG == ZERO_CODE).all()):
        raise UnsupportedError("marlin multiplies symmetric 4 bit weights; other grids belong to gptq")
    if not weight.ordered:
        raise UnsupportedError(
            "marlin needs groups of neighbouring inputs; act_order without static groups belongs to gptq"
        )
    inputs, groups = weight.codes_OI.shape[1], weight.a_OG.shape[1]
    size = inputs if groups == 1 else int((weight.group_I == 0).sum())
    if groups > 1 and size not in GROUP_SIZES:
        raise UnsupportedError(
            f"marlin multiplies groups of {', '.join(map(str, GROUP_SIZES))} or all inputs, not {size}"
        )
    if sparse:
        return SparseMarlinLinear(weight.codes_OI, weight.a_OG, size, bias_O)
    return MarlinLinear(
        weight.codes_OI,
        weight.a_OG,
        weight.a_OG * -float(ZERO_CODE),
        bits=4,
        group_size=size,
        bias_O=bias_O,
        activations=activations,
    )


def fits(layer: KernelLinear) -> bool:
    """Whether a packed layer's codes can run on the MARLIN kernels as they are."""
    if not isinstance(layer, AffineLinear):
        return False
    weight = layer.weight
    size = weight.group_size
    return (
        weight.bits == 4
        and weight.low.kind == OFFSET
        and weight.low.offset == ZERO_CODE
        and weight.scale.kind == HALF_KIND
        and weight.column_K is None
        and (size in GROUP_SIZES or group_count(weight.inputs, size) == 1)
    )
