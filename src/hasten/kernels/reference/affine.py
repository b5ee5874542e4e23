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
    per = 32 // bits
    split = per * bits != 32
    codes = []
    for column in range(32):
        half, within = divmod(column, 16)
        if split and within == 15:
            # Put together from the top two bits of each word: B / 2 whole pairs per half, and for odd widths one bit
            # of the last word.
            code = torch.zeros_like(word_OCB[..., 0])
            for i in range(bits // 2):
                code |= (word_OCB[..., half * (bits // 2) + i] >> 30) << (2 * i)
            if bits % 2:
                code |= ((word_OCB[..., bits - 1] >> (30 + half)) & 1) << (bits - 1)
        else:
            index = column - half if split else column
            code = word_OCB[..., index // per] >> (index % per * bits) & ((1 << bits) - 1)
        codes.append(code)
    return torch.stack(codes, dim=-1).flatten(1)[:outputs, :columns].to(torch.uint8)


def round_activations(x_TI: Tensor, weight: AffineWeight) -> Tensor:
    """``x_TI`` rounded to multiples of max |x| / 127 per 32 stored columns, in its dtype."""
    column_K = torch.arange(weight.inputs) if weight.column_K is None else weight.column_K.long()
    used_K = column_K >= 0
    stored_TK = torch.where(used_K, x_TI[:, column_K.clamp_min(0)], 0.0)
    chunk_TCK = pad(stored_TK, (0, -weight.width % CHUNK)).unflatten(1, (-1, CHUNK))
    top_TC1 = chunk_TCK.float().abs().amax(-1, keepdim=True)
    # Not 127 / top: that multiplies by a reciprocal, which rounds twice and can pick the other neighbour.
    inverse_TC1 = torch.full_like(top_TC1, 127) / top_TC1
    codes_TCK = torch.where(top_TC1 == 0, 0.0, (chunk_TCK.float() * inverse_TC1).round())
    rounded = codes_TCK.to(x_TI.dtype) * (top_TC1 / 127)
    out_TI = x_TI.clone()
    out_TI[:, column_K[used_K]] = rounded.flatten(1)[:, : weight.width][:, used_K]
    return out_TI


def affine(x_TI: Tensor, weight: AffineWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in the dtype of ``x_TI`` (float64 leaves no rounding but the weight's)."""
    codes_OK = unpack_codes(weight.words, weight.outputs, weight.width)
    if weight.activations == "int8":
        x_TI = round_activations(x_TI, weight)
    y_TO = x_TI @ dequantize(weight, codes_OK).to(x_TI.dtype).t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
