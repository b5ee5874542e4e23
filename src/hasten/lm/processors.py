"""Logit processors of one sample: logit bias and penalties.

Applied in this order to a row of logits, before temperature and truncation:

1. logit bias: added to the named tokens (OpenAI).
2. repetition penalty r: tokens seen in prompt or output, positive logits / r, negative ones * r (CTRL,
   arXiv 1909.05858, section 4.1, in the form that keeps the sign's direction).
3. frequency and presence penalties over the *output*: logit -= count * frequency + (count > 0) * presence (OpenAI).

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.core.errors import RequestError
from hasten.lm.request import SamplingParams


def needs_processor(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


class LogitProcessor:
    """State of one sample's penalties: which tokens were seen, and how often in the output."""

    def __init__(self, params: SamplingParams, vocabulary: int, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.seen_V = torch.zeros(vocabulary, dtype=torch.bool)
        self.seen_V[torch.tensor(list(prompt_ids), dtype=torch.int64)] = True
        self.count_V = torch.zeros(vocabulary)
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            for token in params.logit_bias:
                if not 0 <= token < vocabulary:
                    raise RequestError(
                        f"logit_bias: token {token} is not in the vocabulary (0..{vocabulary - 1})"
                    )
            self.bias = (
                torch.tensor(list(params.logit_bias.keys())),
                torch.tensor([float(b) for b in params.logit_bias.values()]),
            )

    def commit(self, token: int) -> None:
        """``token`` was added to the output."""
        self.seen_V[token] = True
        self.count_V[token] += 1

    def apply(self, logits_V: Tensor, ahead: Sequence[int] = ()) -> None:
        """Change the row in place. ``ahead``: guessed output tokens before this row, not committed yet."""
        seen_V, count_V = self.seen_V, self.count_V
        if ahead:
            index = torch.tensor(list(ahead))
            seen_V = seen_V.index_fill(0, index, True)
            count_V = count_V.index_add(0, index, torch.ones(len(ahead)))
        if self.bias is not None:
            logits_V.index_add_(0, *self.bias)
        p = self.params
        if p.repetition_penalty != 1:
            r = p.repetition_penalty
            logits_V.copy_(
                torch.where(seen_V, torch.where(logits_V > 0, logits_V / r, logits_V * r), logits_V)
            )
        if p.frequency_penalty:
            logits_V.sub_(count_V, alpha=p.frequency_penalty)
        if p.presence_penalty:
            logits_V.sub_((count_V > 0).to(logits_V.dtype), alpha=p.presence_penalty)
