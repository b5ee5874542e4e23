"""Slots ``drafter`` and ``verifier``: which tokens are guessed, which guesses are kept.

One round: drafter -> `Proposal` (a chain or a tree) -> one target pass over all proposed tokens -> verifier
accepts a path and one extra token -> the cache is committed to the path and truncated.

Legend: A proposed tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.kernels.vocabulary import argmax
from hasten.lm.request import SamplingParams

if TYPE_CHECKING:
    from hasten.lm.kvcache.cache import KVCache, SequenceKV
    from hasten.lm.processors import LogitProcessor
    from hasten.lm.settings import EngineSettings


@dataclass(frozen=True)
class Proposal:
    """Guessed continuations of one sequence.

    token_ids: the A guessed tokens.
    parent: index into ``token_ids`` of each token's parent, -1 for the last committed token; a chain is
        (-1, 0, 1, ...). Parents come before children.
    probs_AV: the drafter's distribution at each token (float32), None for deterministic guesses.
    """

    token_ids: tuple[int, ...]
    parent: tuple[int, ...]
    probs_AV: Tensor | None = None

    def is_chain(self) -> bool:
        return self.parent == tuple(range(-1, len(self.parent) - 1))


@dataclass(frozen=True)
class Accepted:
    """What the verifier keeps: indices into the proposal (a root-to-node path) and one more token."""

    path: tuple[int, ...]
    next_token: int


@dataclass(frozen=True)
class Ask:
    """A decoding sequence that may be given a draft, and how its tokens will be chosen.

    token_ids: prompt and output, the engine's own growing list: not to be changed. limit: most tokens to guess, at
    least 1. plain: nothing but tokens at positions 0..n-1 entered the model. kv: the sequence's pages, for drafters
    that run on the engine's own cache; all tokens but the last are cached.
    """

    sequence_id: int
    token_ids: Sequence[int]
    limit: int
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    generator: torch.Generator | None = None
    processor: LogitProcessor | None = None
    plain: bool = True
    kv: SequenceKV | None = None


class Drafter(ABC):
    """Guesses tokens. One instance per loaded model; calls come from one thread.

    Implement `propose`, or `propose_all` where the sequences of a step are better served together.
    """

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        """Called once, before anything else, with the engine's cache and limits."""

    def page_bytes(self, page_size: int) -> int:
        """Bytes the drafter keeps beside every page of the engine's cache; they count against its budget."""
        return 0

    @abstractmethod
    def propose(self, sequence_id: int, token_ids: Sequence[int], limit: int) -> Proposal | None:
        """Guess at most ``limit`` tokens after ``token_ids`` (prompt and output); None to decode plainly."""

    def propose_all(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """A guess, or None, for each sequence that decodes in this step."""
        return [self.propose(ask.sequence_id, ask.token_ids, ask.limit) for ask in asks]

    def commit(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        """The sequence's tokens after verification; roll back any drafter state to them.

        Not called for a guess that was never verified (the scheduler may drop one when pages run out).
        """

    def timed(self, rows: int, seconds: float) -> None:
        """What a step of the engine's model took that ran ``rows`` decoding and draft rows, and nothing else."""

    def suspend(self, sequence_id: int) -> None:
        """The sequence lost its pages and waits; drop what can be computed again."""

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""

    def forget_prefixes(self) -> None:
        """Drop what is kept of texts beyond their sequences' lives."""


class Verifier(ABC):
    @abstractmethod
    def verify(
        self, proposal: Proposal, logits_AV: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Accepted:
        """Choose the path to keep. ``logits_AV`` has A+1 rows: row 0 follows the last committed token,
        row i+1 follows proposed token i; all logit processors are already applied."""


class ExactVerifier(Verifier):
    """Lossless acceptance: greedy match at temperature 0, speculative sampling otherwise.

    Sampling keeps a token x with probability min(1, p(x)/q(x)) and draws from norm(max(p-q, 0)) after the
    first rejection (Leviathan et al. 2023, arXiv 2211.17192, section 2.3). For a tree the children of a
    node are tried in order, each rejection replacing p by the residual (SpecInfer, arXiv 2305.09781). A
    deterministic guess has q = 1 at its token.
    """

    def verify(
        self, proposal: Proposal, logits_AV: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Accepted:
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(proposal.parent):
            children.setdefault(parent, []).append(node)
        best = argmax(logits_AV).tolist() if temperature == 0 else []
        path: list[int] = []
        node = -1
        while True:
            row_V = logits_AV[node + 1]
            chosen = -1
            if temperature == 0:
                token = best[node + 1]
                chosen = next((c for c in children.get(node, ()) if proposal.token_ids[c] == token), -1)
                if chosen < 0:
                    return Accepted(tuple(path), token)
            else:
                p_V = torch.softmax(row_V.float() / temperature, dim=-1)
                for child in children.get(node, ()):
                    token = proposal.token_ids[child]
                    q_V = _draft_distribution(proposal, child, p_V)
                    keep = float(p_V[token] / q_V[token]) if q_V[token] > 0 else 0.0
                    if float(torch.rand((), generator=generator)) < keep:
                        chosen = child
                        break
                    residual_V = (p_V - q_V).clamp_min(0)
                    total = residual_V.sum()
                    p_V = residual_V / total if total > 0 else p_V
                if chosen < 0:
                    return Accepted(tuple(path), int(torch.multinomial(p_V, 1, generator=generator)))
            path.append(chosen)
            node = chosen


def _draft_distribution(proposal: Proposal, node: int, like_V: Tensor) -> Tensor:
    if proposal.probs_AV is not None:
        return proposal.probs_AV[node]
    q_V = torch.zeros_like(like_V)
    q_V[proposal.token_ids[node]] = 1.0
    return q_V
