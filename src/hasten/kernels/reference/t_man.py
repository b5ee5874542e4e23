"""Reference of the table look-up kernels: planes by definition, tables by definition, in float64.

Legend: T rows, I inputs, O outputs, K stored columns, G groups, Q quads of columns, S blocks of columns with one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.kernels.affine import expand
from hasten.kernels.t_man import UNIT, PlaneWeight, dequantize, unpack_planes

SCALE_COLUMNS = {"int16": 256, "int8": 64}
LARGEST = {"int16": 32767.0, "int8": 127.0}


def make_tables(x_TK: Tensor, tables: str) -> tuple[Tensor, Tensor]:
    """(integer entries [T, Q, 16], scale of each quad's entries [T, Q]) in float64. Section 4 of the paper.

    Entry p of a quad is the sum of its four activations, plus where the bit of p is set and minus where it is not.
    """
    columns, most = SCALE_COLUMNS[tables], LARGEST[tables]
    x_TQ4 = pad(x_TK, (0, -x_TK.shape[1] % UNIT)).unflatten(1, (-1, 4)).float()
    size_TQ = ((x_TQ4[..., 0].abs() + x_TQ4[..., 1].abs()) + x_TQ4[..., 2].abs()) + x_TQ4[..., 3].abs()
    quads = size_TQ.shape[1]
    top_TS = pad(size_TQ, (0, -quads % (columns // 4))).unflatten(1, (-1, columns // 4)).amax(-1)
    inverse_TS = torch.where(top_TS > 1e-30, torch.full_like(top_TS, most) / top_TS, 0.0)
    sign_P4 = (torch.arange(16)[:, None] >> torch.arange(4) & 1) * 2.0 - 1.0
    sign_P4 = sign_P4[:, None, None, :]
    sums_TQP = (
        ((x_TQ4 * sign_P4)[..., 0] + (x_TQ4 * sign_P4)[..., 1])
        + ((x_TQ4 * sign_P4)[..., 2] + (x_TQ4 * sign_P4)[..., 3])
    ).permute(1, 2, 0)
    inverse_TQ = inverse_TS.repeat_interleave(columns // 4, dim=1)[:, :quads]
    scale_TQ = (top_TS / most).repeat_interleave(columns // 4, dim=1)[:, :quads]
    return (sums_TQP * inverse_TQ[..., None]).round().double(), scale_TQ.double()


def t_man(x_TI: Tensor, weight: PlaneWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in float64, from the rounded tables of ``x_TI``."""
    codes_OK = unpack_planes(weight.planes, weight.outputs, weight.width).long()
    column_K = torch.arange(weight.inputs) if weight.column_K is None else weight.column_K.long()
    x_TK = torch.where(column_K >= 0, x_TI[:, column_K.clamp_min(0)], 0.0)
    entry_TQP, scale_TQ = make_tables(x_TK, weight.tables)
    quad_OQ4 = pad(codes_OK, (0, -weight.width % UNIT)).unflatten(1, (-1, 4))
    looked_TOQ = torch.zeros(x_TI.shape[0], weight.outputs, quad_OQ4.shape[1], dtype=torch.float64)
    quads = torch.arange(quad_OQ4.shape[1])
    for plane in range(weight.bits):
        index_OQ = ((quad_OQ4 >> plane & 1) << torch.arange(4)).sum(-1)
        looked_TOQ += entry_TQP[:, quads, index_OQ] * 2.0 ** (plane - 1)
    group_Q = (quads * 4).clamp_max(weight.width - 1) // weight.group_size
    scale_OG = expand(weight.scale, weight.outputs, weight.nest)
    low_OG = expand(weight.low, weight.outputs, weight.nest, scale_OG)
    offset_OG = low_OG.double() + scale_OG.double() * ((1 << weight.bits) - 1) / 2
    sum_TQ = pad(x_TK, (0, -weight.width % UNIT)).double().unflatten(1, (-1, 4)).sum(-1)
    y_TO = (looked_TOQ * scale_TQ[:, None] * scale_OG.double()[:, group_Q]).sum(-1)
    y_TO = y_TO + sum_TQ @ offset_OG[:, group_Q].t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]


def exact(x_TI: Tensor, weight: PlaneWeight) -> Tensor:
    """``x_TI @ W^T + bias`` [T, O] in float64, from the dequantised weight."""
    y_TO = x_TI.double() @ dequantize(weight).double().t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
