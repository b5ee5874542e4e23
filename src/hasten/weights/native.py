"""Weights as the checkpoint stores them: quantised ones are repacked for the kernels, never quantised again.

| stored as | packed as |
| --- | --- |
| Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 | 4, 5 or 8 bit codes, groups of 32, the file's float16 scales and minima |
| Q4_K, Q5_K | 4 or 5 bit codes, groups of 32, the file's 6 bit scales and minima under its float16 ones per 256 |
| Q6_K | 6 bit codes, groups of 16, the file's 8 bit scales under its float16 ones per 256 |
| GPTQ (Hugging Face layout) | 2, 3, 4 or 8 bit codes, the folder's groups, scales and zero points |
| F32, F16, BF16 | bfloat16 (rounded: float32 and float16 lose bits; ask for dtype float32 to keep them) |

Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h

Legend: O outputs, I inputs, B bytes, M blocks of a row, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from hasten.core.errors import ModelFormatError, UnsupportedError
from hasten.kernels.affine import (
    HALF_KIND,
    NESTED,
    OFFSET,
    AffineWeight,
    Numbers,
    group_count,
    pack_codes,
    pack_groups,
)
from hasten.kernels.packed import pad_rows
from hasten.weights.affine import AffineLinear, check_activations, finest_activations
from hasten.weights.dense import DenseLinear
from hasten.weights.format import LinearSource, PackedLinear, QuantBlocks, WeightFormat
from hasten.weights.gptq_files import stored_linear
from hasten.weights.packed import KernelLinear, StackedLinear


def _half(block_OMB: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of every block, [O, M]."""
    return block_OMB[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(byte: Tensor) -> Tensor:
    """Low halves, then high halves, along the last axis."""
    return torch.cat([byte & 15, byte >> 4], dim=-1)


def _bits(byte_OM4: Tensor) -> Tensor:
    """The 32 bits of four bytes, lowest first, [O, M, 32]."""
    shift = torch.arange(8, dtype=torch.uint8)
    return (byte_OM4[..., None] >> shift & 1).flatten(-2)


def _plain(codes: Tensor, scale_OM: Tensor, low: Tensor | float, bits: int) -> AffineWeight:
    """Groups of 32; ``low`` is float16 [O, M] or the code that stands for zero."""
    codes_OI = codes.flatten(1)
    outputs, inputs = codes_OI.shape
    groups = group_count(inputs, 32)
    stored = (
        Numbers(OFFSET, offset=low)
        if isinstance(low, float)
        else Numbers(HALF_KIND, pack_groups(low, groups))
    )
    scale = Numbers(HALF_KIND, pack_groups(scale_OM, groups))
    return AffineWeight(inputs, outputs, bits, 32, pack_codes(codes_OI, bits), scale, stored)


def _q4_0(block: Tensor) -> AffineWeight:
    return _plain(_nibbles(block[..., 2:]), _half(block, 0), 8.0, 4)


def _q4_1(block: Tensor) -> AffineWeight:
    return _plain(_nibbles(block[..., 4:]), _half(block, 0), _half(block, 2), 4)


def _q5_0(block: Tensor) -> AffineWeight:
    return _plain(_nibbles(block[..., 6:]) | _bits(block[..., 2:6]) << 4, _half(block, 0), 16.0, 5)


def _q5_1(block: Tensor) -> AffineWeight:
    return _plain(_nibbles(block[..., 8:]) | _bits(block[..., 4:8]) << 4, _half(block, 0), _half(block, 2), 5)


def _q8_0(block: Tensor) -> AffineWeight:
    return _plain(block[..., 2:] ^ 128, _half(block, 0), 128.0, 8)


def _nested(
    codes: Tensor, bits: int, size: int, scale_OG: Tensor, low: Tensor | float, outer: list[Tensor]
) -> AffineWeight:
    """Blocks of 256 columns in groups of ``size``. scale_OG, low: int8; or low: the code that stands for zero."""
    codes_OI = codes.flatten(1)
    outputs, inputs = codes_OI.shape
    groups, nest = group_count(inputs, size), 256 // size
    packed = [pack_groups(number, -(-groups // nest)) for number in outer]
    stored = (
        Numbers(OFFSET, offset=low)
        if isinstance(low, float)
        else Numbers(NESTED, pack_groups(low, groups), packed[1])
    )
    scale = Numbers(NESTED, pack_groups(scale_OG, groups), packed[0])
    return AffineWeight(inputs, outputs, bits, size, pack_codes(codes_OI, bits), scale, stored, nest)


def _six_bit(byte: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits from the 12 bytes of a k-quant block, int8 [O, 8 M] each."""
    a, b, c = byte[..., :4], byte[..., 4:8], byte[..., 8:]
    scale = torch.cat([a & 63, c & 15 | (a >> 6) << 4], dim=-1)
    low = torch.cat([b & 63, c >> 4 | (b >> 6) << 4], dim=-1)
    return scale.flatten(1).to(torch.int8), low.flatten(1).to(torch.int8)


def _halves(byte_OMB: Tensor) -> Tensor:
    """Per 32 bytes: their low nibbles, then their high nibbles, [O, M, 8, 32] for 128 bytes."""
    return _nibbles(byte_OMB.unflatten(-1, (-1, 32))).unflatten(-1, (2, 32)).flatten(2, 3)


def _q4_k(block: Tensor) -> AffineWeight:
    scale, low = _six_bit(block[..., 4:16])
    return _nested(_halves(block[..., 16:]), 4, 32, scale, -low, [_half(block, 0), _half(block, 2)])


def _q5_k(block: Tensor) -> AffineWeight:
    scale, low = _six_bit(block[..., 4:16])
    shift = torch.arange(8, dtype=torch.uint8)[:, None]
    high = block[..., None, 16:48] >> shift & 1  # bit g of byte i belongs to column i of group g
    codes = _halves(block[..., 48:]) | high << 4
    return _nested(codes, 5, 32, scale, -low, [_half(block, 0), _half(block, 2)])


def _q6_k(block: Tensor) -> AffineWeight:
    # Twice 128 columns: 64 bytes of low nibbles, 32 bytes of two high bits for columns i, i + 32, i + 64, i + 96.
    low = _nibbles(block[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32))
    shift = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = block[..., 128:192].unflatten(-1, (2, 1, 32)) >> shift & 3
    scale = block[..., 192:208].contiguous().view(torch.int8).flatten(1)
    return _nested((low | high << 4).flatten(2), 6, 16, scale, 32.0, [_half(block, 208)])


_REPACK: dict[str, tuple[int, Callable[[Tensor], AffineWeight]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}


def repack(blocks: QuantBlocks) -> AffineWeight:
    """The kernels' layout of GGUF blocks: the same numbers in another order.

    Raises `UnsupportedError` for a type without a packed form, `ModelFormatError` for rows of the wrong length.
    """
    if blocks.kind not in _REPACK:
        raise UnsupportedError(
            f"{blocks.kind} weights cannot be repacked ({', '.join(_REPACK)} can); use dtype bfloat16"
        )
    size, unpack = _REPACK[blocks.kind]
    columns = 256 if blocks.kind.endswith("_K") else 32
    count = blocks.inputs // columns
    if blocks.data_OB.dim() != 2 or blocks.inputs % columns or blocks.data_OB.shape[1] != count * size:
        raise ModelFormatError(
            f"{blocks.kind} rows of {blocks.inputs} weights take {count * size} bytes, "
            f"not {tuple(blocks.data_OB.shape)}"
        )
    return unpack(blocks.data_OB.contiguous().view(-1, count, size))


class NativeFormat(WeightFormat):
    """Every linear layer as the checkpoint stores it (``dtype = "auto"``); see the table at the top of the file.

    activations: what quantised layers round their inputs to. ``"int16"``: per row, finer than bfloat16 (perplexity
    within 0.1%). ``"int8"``: per 32 inputs where codes have 4 bits (faster for many rows; perplexity rises by
    some 0.3%). ``"float32"``: nothing. GPTQ folders and plain weights always meet float32 activations.
    """

    def __init__(self, activations: str = "int16") -> None:
        check_activations(activations)
        self.activations = activations

    def pack(self, source: LinearSource) -> PackedLinear:
        """Repack the source's blocks; parts of one type that lie next to each other become one layer."""
        if source.blocks is None:
            return stored_linear(source) or DenseLinear(source.dense(), source.bias_O, torch.bfloat16)
        parts: list[KernelLinear] = []
        start = 0
        for kind, run in groupby(source.blocks, key=lambda blocks: blocks.kind):
            data_OB = torch.cat([blocks.data_OB for blocks in run])
            weight = repack(QuantBlocks(kind, data_OB, source.inputs))
            if source.bias_O is not None:
                bias_O = source.bias_O[start : start + weight.outputs].float()
                weight = replace(weight, bias_P=pad_rows(bias_O).flatten())
            start += weight.outputs
            activations = finest_activations(self.activations, weight.bits, weight.group_size)
            parts.append(AffineLinear.from_weight(replace(weight, activations=activations)))
            parts[-1].exact = True
        return parts[0] if len(parts) == 1 else StackedLinear(parts)
