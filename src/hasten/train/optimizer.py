"""AdamW (Loshchilov and Hutter 2019) with linear warm-up and cosine decay (ibid. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.core.errors import SettingError


@dataclass(frozen=True)
class AdamWSettings:
    """``warmup``: steps until ``peak`` is reached; ``floor``: the last step's rate over ``peak``; ``clip``: largest
    norm of all gradients together."""

    peak: float = 1.5e-3
    warmup: int = 40
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not (self.peak > 0 and self.warmup >= 0 and 0 <= self.floor <= 1 and self.clip > 0):
            raise SettingError(f"need peak > 0, warmup >= 0, 0 <= floor <= 1 and clip > 0, not {self}")


def learning_rate(settings: AdamWSettings, step: int, steps: int) -> float:
    """The rate of ``step`` (from 0) of ``steps``: up in ``warmup`` steps to the peak, down a cosine to the floor."""
    if step < settings.warmup:
        return settings.peak * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.peak * (settings.floor + (1 - settings.floor) * cosine)


def adamw(model: nn.Module, settings: AdamWSettings) -> torch.optim.AdamW:
    """The optimizer of ``model``; matrices decay, norms and biases do not. A tied weight is one parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.peak, betas=settings.betas, eps=settings.eps, fused=True, foreach=False
    )


def state_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter: ``layers.0.o_proj.weight.exp_avg`` and so on. Empty before the first step."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(optimizer: torch.optim.AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. Raises `KeyError` naming what is missing."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
