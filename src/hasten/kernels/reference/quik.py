"""Reference of the rounded linear layer with outlier features: the formula, step by step.

Legend: T rows, I inputs, O outputs, K base features, F outlier features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.quik import QuikWeight, codes, dequantize, outlier_weight


def quantize_rows(x_TI: Tensor, weight: QuikWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes q_x [T, K], s_T, z_T and outliers [T, F] in the dtype of ``x_TI``; float32 rounds as the kernel does."""
    top = (1 << weight.bits) - 1
    base_TK, outlier_TF = x_TI[:, weight.base_K.long()], x_TI[:, weight.outlier_F.long()]
    low_T, high_T = torch.aminmax(base_TK, dim=1)
    range_T = high_T - low_T
    # Not top / range: that multiplies by a reciprocal, which rounds twice and can pick the other neighbour.
    inverse_T = torch.full_like(range_T, top) / range_T
    flat_T = ~(inverse_T > 0) | torch.isinf(inverse_T)
    bad_T = ~torch.isfinite(base_TK).all(1) | ~torch.isfinite(range_T)
    inverse_T = torch.where(flat_T | bad_T, 0.0, inverse_T)
    code_TK = ((base_TK - low_T[:, None]) * inverse_T[:, None]).nan_to_num(0.0).round().clamp(0, top)
    scale_T = torch.where(bad_T, float("nan"), torch.where(flat_T, 0.0, range_T / top))
    return code_TK - (1 << (weight.bits - 1)), scale_T, torch.where(bad_T, 0.0, low_T), outlier_TF


def quik(x_TI: Tensor, weight: QuikWeight) -> Tensor:
    """y [T, O] in the dtype of ``x_TI``. Inputs are rounded in float32, as in the kernel; float64 adds nothing then."""
    if weight.base_K.numel() == 0:
        y_TO = x_TI @ dequantize(weight).to(x_TI.dtype).t()
        return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
    code_TK, scale_T, zero_T, _ = (part.to(x_TI.dtype) for part in quantize_rows(x_TI.float(), weight))
    q_OK = codes(weight).to(x_TI.dtype)
    s_O, half = weight.scale_P[: weight.outputs].to(x_TI.dtype), 1 << (weight.bits - 1)
    sum_TO = code_TK @ q_OK.t()
    wred_O = s_O * q_OK.sum(1)
    y_TO = sum_TO * scale_T[:, None] * s_O + (zero_T + half * scale_T)[:, None] * wred_O
    y_TO += x_TI[:, weight.outlier_F.long()] @ outlier_weight(weight).to(x_TI.dtype).t()
    return y_TO if weight.bias_P is None else y_TO + weight.bias_P[: weight.outputs]
