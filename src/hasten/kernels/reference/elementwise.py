"""RMSNorm and gated activations in plain PyTorch; see `hasten.kernels.block`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` in float64, rounded to float32."""
    x_TE = x_TE.double()
    return (x_TE / torch.sqrt(x_TE.square().mean(-1, keepdim=True) + eps) * weight_E.double()).float()


def gated(gate_up_TI2: Tensor, *, gelu: bool = False) -> Tensor:
    """``activation(gate) * up`` [T, I], in float64, rounded to float32."""
    gate_TI, up_TI = gate_up_TI2.double().chunk(2, dim=-1)
    gate_TI = functional.gelu(gate_TI, approximate="tanh") if gelu else functional.silu(gate_TI)
    return (gate_TI * up_TI).float()
