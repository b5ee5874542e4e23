"""Reference of the MARLIN kernels: dense codes are those of `affine`; 2:4 ones are put back in place and multiplied.

Legend: T rows, I inputs, O outputs, C chunks of 32 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.affine import AffineWeight
from hasten.kernels.marlin import SparseWeight
from hasten.kernels.packed import BLOCK
from hasten.kernels.reference.affine import affine


def dequantize_sparse(weight: SparseWeight) -> Tensor:
    """The float32 weight [O, I] by the layout's definition, chunk by chunk and four by four."""
    word_OC3 = weight.words.permute(0, 3, 1, 2).flatten(0, 1)[: weight.outputs].long() & 0xFFFFFFFF
    assert weight.scale.value is not None
    weight_OI = torch.zeros(weight.outputs, word_OC3.shape[1] * 32)
    row_O = torch.arange(weight.outputs)
    for four in range(weight_OI.shape[1] // 4):
        chunk, q = divmod(four, 8)
        scale_O = weight.scale.value[
            row_O // BLOCK, min(4 * four, weight.inputs - 1) // weight.group_size, row_O % BLOCK
        ]
        for kept in range(2):
            code_O = word_OC3[:, chunk, kept] >> 4 * q & 15
            place_O = word_OC3[:, chunk, 2] >> 4 * q + 2 * kept & 3
            weight_OI[row_O, 4 * four + place_O] += scale_O.float() * (code_O - 8)
    return weight_OI[:, : weight.inputs]


def marlin(x_TI: Tensor, weight: AffineWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in the dtype of ``x_TI``; activations rounded as the kernel does."""
    return affine(x_TI, weight)


def marlin_sparse(x_TI: Tensor, weight: SparseWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in the dtype of ``x_TI``."""
    y_TO = x_TI @ dequantize_sparse(weight).to(x_TI.dtype).t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
