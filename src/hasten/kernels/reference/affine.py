"""Reference of the group-quantised linear kernel: unpack, dequantise, multiply.

Legend: T rows, I inputs, O outputs, K stored columns, G groups, N blocks of 16 outputs, C chunks of 32 columns, B bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.kernels.affine import CHUNK, AffineWeight, dequantize


def unpack_codes(words: Tensor, outputs: int, columns: int) -> Tensor:
    """The codes uint8 [O, K] of packed words [N, C, B, 16], by the layout's definition."""
    bits = words.shape[2]
    word_OCB = words.permute(0, 3, 1, 2).flatten(0, 1).to(torch.int64) & 0xFFFFFFFF

    def field(word: int, bit: int, count: int) -> Tensor:
        return word_OCB[..., word] >> bit & ((1 << count) - 1)

    codes = []
    for column in range(32):
        eighth, within = divmod(column, 8)
        if bits in (5, 6):
            # Four bits as 4 bit codes lie; the others in words 4 and 5, by byte (pair of nibbles), word and nibble.
            high = bits - 4
            place = (eighth * 2 + within % 2) * high
            code = (
                field(eighth, within * 4, 4) | field(4 + place // 8, within // 2 * 8 + place % 8, high) << 4
            )
        elif bits == 3 and column % 16 == 15:
            # Put together from the top two bits of the half's own word and one bit of the last word.
            half = column // 16
            code = field(half, 30, 2) | field(2, 30 + half, 1) << 2
        else:
            index = column - column // 16 if bits == 3 else column
            code = field(index // (32 // bits), index % (32 // bits) * bits, bits)
        codes.append(code)
    return torch.stack(codes, dim=-1).flatten(1)[:outputs, :columns].to(torch.uint8)


def round_activations(x_TI: Tensor, weight: AffineWeight) -> Tensor:
    """``x_TI`` as the kernel rounds it, in its dtype.

    int8: to multiples of max |x| / 127 per 32 stored columns. int16: to multiples of max |x| / 32767 per row.
    """
    if weight.activations == "float32":
        return x_TI
    column_K = torch.arange(weight.inputs) if weight.column_K is None else weight.column_K.long()
    used_K = column_K >= 0
    stored_TK = torch.where(used_K, x_TI[:, column_K.clamp_min(0)], 0.0)
    size, most = (CHUNK, 127.0) if weight.activations == "int8" else (weight.width, 32767.0)
    part_TSK = pad(stored_TK, (0, -weight.width % size)).unflatten(1, (-1, size))
    top_TS1 = part_TSK.float().abs().amax(-1, keepdim=True)
    # Not most / top: that multiplies by a reciprocal, which rounds twice and can pick the other neighbour.
    inverse_TS1 = torch.full_like(top_TS1, most) / top_TS1
    codes_TSK = torch.where(top_TS1 == 0, 0.0, (part_TSK.float() * inverse_TS1).round())
    rounded = codes_TSK.to(x_TI.dtype) * (top_TS1 / most)
    out_TI = x_TI.clone()
    out_TI[:, column_K[used_K]] = rounded.flatten(1)[:, : weight.width][:, used_K]
    return out_TI


def affine(x_TI: Tensor, weight: AffineWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in the dtype of ``x_TI`` (float64 leaves no rounding but the weight's)."""
    codes_OK = unpack_codes(weight.words, weight.outputs, weight.width)
    x_TI = round_activations(x_TI, weight)
    y_TO = x_TI @ dequantize(weight, codes_OK).to(x_TI.dtype).t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
