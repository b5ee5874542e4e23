"""Slot ``expert_router``: which experts a token visits.

Legend: T rows, E hidden size, X experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ExpertRouter(ABC):
    @abstractmethod
    def route(self, layer: int, logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Return (expert_TK int64, weight_TK float32). A weight of 0 means the slot is unused."""


class TopKRouter(ExpertRouter):
    """Softmax over the k best experts of each token (Shazeer et al. 2017; Mixtral's order of operations)."""

    def __init__(self, k: int) -> None:
        self.k = k

    def route(self, layer: int, logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.topk(logits_TX.float(), self.k, dim=-1)
        return best.indices, torch.softmax(best.values, dim=-1)
