"""MARLIN linear layers (arXiv 2408.11743): symmetric 4 bit codes, w[o, i] = scale[o, g] * (code[o, i] - 8).

Dense codes lie as `hasten.kernels.affine` packs them; activations are float32 (exact), int16 or int8 as there. 2:4
sparse ones keep two of four consecutive inputs, three bits per weight; activations are float32. Work is cut into
stripes, one per thread; what two stripes share of an output is added in a fixed order, so that results are the same
every time. Rows do not influence each other: up to 96 rows, int16 and int8 give a row the same bits whatever its
company.

Legend: I inputs, O outputs, C chunks of 32 inputs, N blocks of 16 outputs, G groups, P outputs filled up to whole
blocks, Q runs of four consecutive inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.kernels.affine import (
    CHUNK,
    HALF,
    HALF_KIND,
    OFFSET,
    SINGLE,
    AffineWeight,
    Numbers,
    affine,
    expand,
    group_count,
)
from hasten.kernels.native import native
from hasten.kernels.packed import BLOCK, Packed, address, pad_rows

ZERO_CODE = 8
GROUP_SIZES = (32, 64, 128, 256)
_ALIGNMENT = 64


@dataclass(frozen=True)
class Segment:
    """Panels [first, last) of one column of work, done by one stripe."""

    stripe: int
    column: int
    first: int
    last: int


def stripes(columns: int, panels: int, count: int) -> list[Segment]:
    """The striped partition of ``columns`` x ``panels`` work items (panels fastest) into ``count`` equal stripes.

    Source: section 3.4, "striped partitioning". Raises `ValueError` for negative or zero counts.
    """
    return [Segment(*segment) for segment in native().marlin_stripes(columns, panels, count)]


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A packed 2:4 weight. words: int32 [N, C, 3, 16]. group_size: inputs per scale, a multiple of 32.

    scale: HALF_KIND or SINGLE, [N, G, 16]. bias_P: float32 or None. See native/src/kernels/marlin.h for the words.
    """

    inputs: int
    outputs: int
    group_size: int
    words: Tensor
    scale: Numbers
    bias_P: Tensor | None = None


def pack_two_of_four(codes_OI: Tensor) -> Tensor:
    """Pack uint8 codes [O, I] of which at most two in each four consecutive inputs are not 8, as int32 [N, C, 3, 16].

    Raises `TypeError` (dtype) or `ValueError` (shape, code above 15, three or more weights in one four).
    """
    if codes_OI.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes_OI.dtype}")
    if codes_OI.dim() != 2 or 0 in codes_OI.shape:
        raise ValueError(f"codes must be a non-empty [outputs, inputs], not {tuple(codes_OI.shape)}")
    if int(codes_OI.max()) > 15:
        raise ValueError(f"codes reach {int(codes_OI.max())}; 4 bits end at 15")
    codes_OQ4 = pad(codes_OI, (0, -codes_OI.shape[1] % CHUNK), value=ZERO_CODE).unflatten(1, (-1, 4))
    zero_OQ4 = codes_OQ4 == ZERO_CODE
    crowded = ((~zero_OQ4).sum(-1) > 2).nonzero()
    if len(crowded):
        row, four = crowded[0].tolist()
        raise ValueError(f"output {row} keeps more than two of the inputs {4 * four} to {4 * four + 3}")
    # The places of what is kept, ascending; fours with fewer weights keep zeros.
    place_OQ2 = zero_OQ4.to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values
    kept_OQ2 = codes_OQ4.gather(-1, place_OQ2).long()
    word_OQ3 = torch.cat([kept_OQ2, place_OQ2[..., :1] | place_OQ2[..., 1:] << 2], dim=-1)
    shift = torch.arange(0, 32, 4)[:, None]
    words_OC3 = (word_OQ3.unflatten(1, (-1, 8)) << shift).sum(2)
    words_OC3 = words_OC3.where(words_OC3 < 1 << 31, words_OC3 - (1 << 32)).to(torch.int32)
    return pad_rows(words_OC3).permute(0, 2, 3, 1).contiguous()


def unpack_two_of_four(words: Tensor, outputs: int, inputs: int) -> Tensor:
    """The codes uint8 [O, I] that `pack_two_of_four` packed: 8 wherever nothing is kept."""
    word_OC3 = words.permute(0, 3, 1, 2).flatten(0, 1)[:outputs].long() & 0xFFFFFFFF
    nibble_OQ3 = (word_OC3[:, :, None] >> torch.arange(0, 32, 4)[:, None] & 15).flatten(1, 2)
    codes_OQ4 = torch.full((*nibble_OQ3.shape[:2], 4), ZERO_CODE, dtype=torch.uint8)
    for kept in range(2):
        place = nibble_OQ3[..., 2] >> 2 * kept & 3
        codes_OQ4.scatter_(-1, place[..., None], nibble_OQ3[..., kept, None].to(torch.uint8))
    return codes_OQ4.flatten(1)[:, :inputs].contiguous()


def dequantize_sparse(weight: SparseWeight) -> Tensor:
    """The exact float32 weight [O, I]."""
    codes_OI = unpack_two_of_four(weight.words, weight.outputs, weight.inputs).float()
    scale_OG = expand(weight.scale, weight.outputs, 1)
    return (codes_OI - ZERO_CODE) * scale_OG[:, torch.arange(weight.inputs) // weight.group_size]


def _aligned(words: Tensor) -> None:
    if words.data_ptr() % _ALIGNMENT:
        raise ValueError(f"words must begin at a multiple of {_ALIGNMENT} bytes; pass a copy (words.clone())")


def _check_group(inputs: int, size: int) -> None:
    if group_count(inputs, size) > 1 and size not in GROUP_SIZES:
        raise ValueError(
            f"group_size = {size}: choose {', '.join(map(str, GROUP_SIZES))}, or one group for all {inputs} inputs"
        )


def marlin(weight: AffineWeight, *, module: ModuleType | None = None) -> Packed:
    """The layer of a dense weight: 4 bits, low = OFFSET 8, groups of 32, 64, 128, 256 or all inputs, inputs in order.

    module: a native module of another level than the best (tests). Raises `TypeError` or `ValueError` naming what
    does not fit.
    """
    if weight.bits != 4:
        raise ValueError(f"bits = {weight.bits}: these kernels multiply 4 bits")
    if weight.low.kind != OFFSET or weight.low.offset != ZERO_CODE:
        raise ValueError("low: these kernels need symmetric weights, scale * (code - 8)")
    if weight.column_K is not None:
        raise ValueError("column: these kernels take inputs in their own order")
    _check_group(weight.inputs, weight.group_size)
    _aligned(weight.words)
    parent = affine(weight, module=module)
    handle = parent.module.packed_marlin(parent.handle)
    return Packed(parent.module, handle, weight.inputs, weight.outputs, (weight,))


def marlin_sparse(weight: SparseWeight, *, module: ModuleType | None = None) -> Packed:
    """The layer of a 2:4 weight. Raises `TypeError` or `ValueError` naming what does not fit."""
    inputs, size = weight.inputs, weight.group_size
    if size < 1 or size % CHUNK:
        raise ValueError(f"group_size = {size}: groups are multiples of {CHUNK} inputs")
    _check_group(inputs, size)
    if weight.scale.kind not in (HALF_KIND, SINGLE):
        raise ValueError("scale: float16 or float32 numbers, one per group")
    blocks, groups = -(-weight.outputs // BLOCK), group_count(inputs, size)
    dtype = torch.float16 if weight.scale.kind == HALF_KIND else torch.float32
    words = address("words", weight.words, (blocks, -(-inputs // CHUNK), 3, BLOCK), torch.int32)
    _aligned(weight.words)
    lib = native() if module is None else module
    handle = lib.packed_marlin_sparse(
        inputs,
        weight.outputs,
        size // HALF,
        groups,
        words,
        weight.scale.kind == HALF_KIND,
        address("scale", weight.scale.value, (blocks, groups, BLOCK), dtype),
        address("bias", weight.bias_P, (blocks * BLOCK,), torch.float32),
    )
    return Packed(lib, handle, inputs, weight.outputs, (weight,))
