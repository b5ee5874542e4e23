"""Linear layers over group-quantised weights: w[o, i] = scale[o, g] * code[o, i] + low[o, g].

Codes of 2, 3, 4, 5, 6 or 8 bits are packed densely (see native/src/kernels/affine_codes.h). With float32 activations
accumulation is float32, so the result is that of the dequantised weight up to rounding: a few rows multiply codes as
they are cut out of their words, y = sum_g scale_g (sum code x) + low_g (sum x); more rows dequantise a block of 16
outputs and use the dense tile. Source: GPTQ (arXiv 2210.17323), section 4, inference kernel.

Rounded activations are multiplied as integers, exactly, and scaled in float32; rows do not influence each other:

| activations | rounded to multiples of | bits of codes | groups of |
| --- | --- | --- | --- |
| int16 | max / 32767 of the row: finer than bfloat16 | 4, 5, 6, 8 | any multiple of 16 |
| int8 | max / 127 per 32 stored columns | 4 (8 bit codes gain nothing over int16) | multiples of 32 |

How scales and lows are stored is a `Numbers`: float16, float32, int8 times a float16 per several groups (k-quants), or,
for lows, multiples of the scale: one for all (offset) or a uint8 per group (zero points).

Legend: I inputs, O outputs, K stored columns, C chunks of 32 columns, B bits, G groups of all chunks,
N blocks of 16 outputs, S outer groups, P outputs filled up to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.kernels.native import native
from hasten.kernels.packed import BLOCK, Packed, address, pad_rows

BITS = (2, 3, 4, 5, 6, 8)
CHUNK = 32  # columns
HALF = 16  # columns: groups begin and end at multiples of this
ACTIVATIONS = ("float32", "int8", "int16")

HALF_KIND, SINGLE, NESTED, OFFSET, ZERO = range(5)
_DTYPES = {HALF_KIND: torch.float16, SINGLE: torch.float32, NESTED: torch.int8, ZERO: torch.uint8}


@dataclass(frozen=True, eq=False)
class Numbers:
    """One number per group and output, packed. kind: HALF_KIND, SINGLE, NESTED, OFFSET or ZERO.

    value: [N, G, 16] in the kind's dtype, None for OFFSET. outer: float16 [N, S, 16] of NESTED. offset: of OFFSET.
    """

    kind: int
    value: Tensor | None = None
    outer: Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class AffineWeight:
    """A packed weight. words: int32 [N, C, B, 16]. group_size: stored columns per group, a multiple of 16.

    nest: groups per outer number of NESTED. column_K: int32, the input of each stored column (-1: none), None if in
    order. bias_P: float32. activations: "float32", "int16" or "int8" (see `has_activations`).
    """

    inputs: int
    outputs: int
    bits: int
    group_size: int
    words: Tensor
    scale: Numbers
    low: Numbers
    nest: int = 1
    column_K: Tensor | None = None
    bias_P: Tensor | None = None
    activations: str = "float32"

    @property
    def width(self) -> int:
        """Stored columns."""
        return self.inputs if self.column_K is None else self.column_K.numel()


def has_activations(activations: str, bits: int, group_size: int) -> bool:
    """Whether codes of ``bits`` in groups of ``group_size`` stored columns can meet such activations."""
    if activations == "int8":
        return bits == 4 and group_size % CHUNK == 0
    return activations == "float32" or bits >= 4


def group_count(width: int, group_size: int) -> int:
    """Groups of ``width`` columns filled up to whole chunks: what the packed tensors hold."""
    return -(-(-(-width // CHUNK) * CHUNK) // group_size)


def checked_codes(codes_OK: Tensor, bits: int, known: Sequence[int]) -> Tensor:
    """The codes uint8 [O, K], contiguous. Raises `TypeError` (dtype) or `ValueError` (shape, bits that are not
    ``known``)."""
    if bits not in known:
        raise ValueError(f"bits = {bits}: codes of {', '.join(map(str, known))} bits can be packed")
    if codes_OK.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes_OK.dtype}")
    if codes_OK.dim() != 2 or 0 in codes_OK.shape:
        raise ValueError(f"codes must be a non-empty [outputs, inputs], not {tuple(codes_OK.shape)}")
    return codes_OK.contiguous()


def pack_codes(codes_OK: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [O, K] as int32 words [N, C, B, 16]. Raises `ValueError` if a code exceeds ``bits``."""
    codes_OK = checked_codes(codes_OK, bits, BITS)
    outputs, columns = codes_OK.shape
    words = torch.empty(-(-outputs // BLOCK), -(-columns // CHUNK), bits, BLOCK, dtype=torch.int32)
    if not native().pack_codes(codes_OK.data_ptr(), outputs, columns, bits, words.data_ptr()):
        raise ValueError(f"codes reach {int(codes_OK.max())}; {bits} bits end at {(1 << bits) - 1}")
    return words


def unpack_codes(words: Tensor, outputs: int, columns: int) -> Tensor:
    """The codes uint8 [O, K] that `pack_codes` packed."""
    shape = (-(-outputs // BLOCK), -(-columns // CHUNK), words.shape[2], BLOCK)
    start = address("words", words, shape, torch.int32)
    codes_OK = torch.empty(outputs, columns, dtype=torch.uint8)
    native().unpack_codes(start, outputs, columns, words.shape[2], codes_OK.data_ptr())
    return codes_OK


def pack_groups(value_OG: Tensor, groups: int) -> Tensor:
    """[O, g] as [N, G, 16], groups beyond ``g`` filled up with zeros."""
    if value_OG.shape[1] > groups:
        raise ValueError(f"{value_OG.shape[1]} groups do not fit into {groups}")
    return pad_rows(pad(value_OG, (0, groups - value_OG.shape[1]))).transpose(1, 2).contiguous()


def unpack_groups(value_NG16: Tensor, outputs: int) -> Tensor:
    """[O, G] of `pack_groups`."""
    return value_NG16.transpose(1, 2).flatten(0, 1)[:outputs]


def expand(numbers: Numbers, outputs: int, nest: int, scale_OG: Tensor | None = None) -> Tensor:
    """One float32 number per output and group [O, G]. scale_OG: for lows that are multiples of the scale."""
    if numbers.kind == OFFSET:
        assert scale_OG is not None
        return -numbers.offset * scale_OG
    assert numbers.value is not None
    value_OG = unpack_groups(numbers.value, outputs).float()
    if numbers.kind == NESTED:
        assert numbers.outer is not None
        outer_OS = unpack_groups(numbers.outer, outputs).float()
        return value_OG * outer_OS.repeat_interleave(nest, dim=1)[:, : value_OG.shape[1]]
    if numbers.kind == ZERO:
        assert scale_OG is not None
        return -value_OG * scale_OG
    return value_OG


def dequantize(weight: AffineWeight, codes_OK: Tensor | None = None) -> Tensor:
    """The exact float32 weight [O, I]. Grids with zero points are scale * (code - zero), others scale * code + low.

    codes_OK: uint8, already unpacked.
    """
    if codes_OK is None:
        codes_OK = unpack_codes(weight.words, weight.outputs, weight.width)
    codes_OK = codes_OK.float()
    group_K = torch.arange(weight.width) // weight.group_size
    scale_OG = expand(weight.scale, weight.outputs, weight.nest)
    scale_OK = scale_OG[:, group_K]
    if weight.low.kind == OFFSET:
        stored_OK = (codes_OK - weight.low.offset) * scale_OK
    elif weight.low.kind == ZERO:
        assert weight.low.value is not None
        zero_OG = unpack_groups(weight.low.value, weight.outputs).float()
        stored_OK = (codes_OK - zero_OG[:, group_K]) * scale_OK
    else:
        low_OG = expand(weight.low, weight.outputs, weight.nest, scale_OG)
        stored_OK = codes_OK * scale_OK + low_OG[:, group_K]
    if weight.column_K is None:
        return stored_OK
    used_K = weight.column_K >= 0
    weight_OI = torch.zeros(weight.outputs, weight.inputs)
    weight_OI[:, weight.column_K[used_K].long()] = stored_OK[:, used_K]
    return weight_OI


def number_address(name: str, numbers: Numbers, weight: AffineWeight, groups: int) -> tuple[int, int]:
    """The addresses of stored numbers and of their outer ones. Raises naming what does not fit the weight."""
    blocks = weight.words.shape[0]
    if numbers.kind == OFFSET:
        return 0, 0
    if numbers.value is None or (numbers.kind == NESTED) == (numbers.outer is None):
        raise ValueError(f"{name}: stored values and kind {numbers.kind} do not go together")
    value = address(name, numbers.value, (blocks, groups, BLOCK), _DTYPES[numbers.kind])
    outer = -(-groups // weight.nest)
    return value, address(f"outer {name}", numbers.outer, (blocks, outer, BLOCK), torch.float16)


def affine(weight: AffineWeight, *, module: ModuleType | None = None) -> Packed:
    """The layer of a packed weight.

    module: a native module of another level than the best (tests). Raises `TypeError` or `ValueError` naming the
    tensor that does not fit the others.
    """
    width, bits, size = weight.width, weight.bits, weight.group_size
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: choose one of {', '.join(map(str, BITS))}")
    if size < 1 or size % HALF or weight.nest < 1:
        raise ValueError(f"group_size = {size}, nest = {weight.nest}: groups are multiples of {HALF} columns")
    if weight.scale.kind in (OFFSET, ZERO):
        raise ValueError("scales cannot be multiples of themselves")
    if weight.column_K is not None and (
        int(weight.column_K.max()) >= weight.inputs or int(weight.column_K.min()) < -1
    ):
        raise ValueError(f"column names an input outside [0, {weight.inputs})")
    if weight.activations not in ACTIVATIONS:
        raise ValueError(f"activations = {weight.activations!r}: choose one of {', '.join(ACTIVATIONS)}")
    if not has_activations(weight.activations, bits, size):
        raise ValueError(
            f"no kernel for {weight.activations} activations, {bits} bits and groups of {size} columns"
        )
    blocks, groups = -(-weight.outputs // BLOCK), group_count(width, size)
    scale, outer_scale = number_address("scale", weight.scale, weight, groups)
    low, outer_low = number_address("low", weight.low, weight, groups)
    lib = native() if module is None else module
    handle = lib.packed_affine(
        weight.inputs,
        weight.outputs,
        bits,
        width,
        size // HALF,
        groups,
        weight.nest,
        address("words", weight.words, (blocks, -(-width // CHUNK), bits, BLOCK), torch.int32),
        weight.scale.kind,
        scale,
        outer_scale,
        weight.low.kind,
        low,
        outer_low,
        weight.low.offset,
        address("bias", weight.bias_P, (blocks * BLOCK,), torch.float32),
        address("column", weight.column_K, (width,), torch.int32),
        ACTIVATIONS.index(weight.activations),
    )
    return Packed(lib, handle, weight.inputs, weight.outputs, (weight,))
