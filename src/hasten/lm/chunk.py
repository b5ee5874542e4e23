"""What a step runs of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.lm.kvcache.cache import SequenceKV


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run: a prefill chunk, a decode token, a draft, or a range to recompute.

    start: index of the first token in the sequence; tokens before it are cached, slots are reserved.
    positions: rotary positions of the tokens; logits: how many of the last rows need logits (0: none).
    embeddings_TE: rows to use instead of the embeddings of the chunk's first tokens.
    prompt: whether the first of them is a prompt's token. Then they are read, not decoded, be it a single one.
    tree: parents of the last tokens, if they are nodes of a tree (`StepLayout.trees`); runs only where `Runner.trees`.
    """

    kv: SequenceKV
    start: int
    token_ids: Sequence[int]
    positions: Sequence[int]
    logits: int
    embeddings_TE: Tensor | None = None
    tree: tuple[int, ...] = ()
    prompt: bool = False
