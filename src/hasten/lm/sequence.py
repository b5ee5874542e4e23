"""`Sequence`: one sample on its way through the engine, and the `Request` it belongs to."""

from __future__ import annotations

import enum
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hasten.lm.kvcache.cache import SequenceKV
from hasten.lm.request import (
    Completion,
    Delta,
    FinishReason,
    Ledger,
    Sample,
    SamplingParams,
    Timing,
    TokenLogprob,
)

if TYPE_CHECKING:
    from hasten.lm.context.transform import Prompt, PromptTransform
    from hasten.lm.decoding.speculate import Proposal
    from hasten.lm.processors import LogitProcessor
    from hasten.lm.text import TextStream


class Status(enum.Enum):
    HELD = "held"  # a further sample of n > 1, until the prompt is computed
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Tokens of one sample and what is known about them.

    token_ids: prompt, then output. The last one is not cached yet while the sequence is decoding.
    draft: guessed tokens to verify in the next step. kv: its pages, None while it waits without any.
    key: scheduling order: smaller runs first.
    """

    id: int
    index: int
    request: Request
    token_ids: list[int]
    prompt_length: int
    generator: torch.Generator
    text: TextStream
    key: tuple[int, int, int]
    processor: LogitProcessor | None = None
    status: Status = Status.WAITING
    kv: SequenceKV | None = None
    draft: Proposal | None = None
    finish: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def segments(self) -> SequenceOf[int]:
        """Where the parts of its prompt end (`Prompt.segments`)."""
        return self.request.prompt.segments

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are cached."""
        return 0 if self.kv is None else self.kv.length

    @property
    def remaining(self) -> int:
        """Rows the next steps have to run: tokens not cached yet, and the draft."""
        return len(self.token_ids) - self.computed + (0 if self.draft is None else len(self.draft.token_ids))

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @cached_property
    def phase(self) -> int:
        """A number that spreads over sequences and is the same in every run: who takes turns does so by it."""
        prompt = self.token_ids[: self.prompt_length]
        return zlib.crc32(array("q", prompt).tobytes()) + 97 * self.index

    def positions(self, start: int, stop: int) -> SequenceOf[int]:
        """Rotary positions of tokens [start, stop): the prompt's own ones, then counting on."""
        own = self.request.prompt.position_ids
        if own is None:
            return range(start, stop)
        after = max(own) + 1 - len(own)
        return [own[i] if i < len(own) else after + i for i in range(start, stop)]


@dataclass(eq=False)
class Request:
    """One call of `Engine.submit`. ``deltas`` fills as the engine steps; ``completion`` is ready when done.

    failure: the exception that ended the request, when its finish reason is ``error``. transforms: what made its prompt
    and may mend its answer's text.
    """

    id: int
    prompt: Prompt
    params: SamplingParams
    priority: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    deltas: deque[Delta] = field(default_factory=deque)
    on_delta: Callable[[Delta], None] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    failure: Exception | None = None
    transforms: tuple[PromptTransform, ...] = ()
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def done(self) -> bool:
        return all(s.finish is not None for s in self.sequences)

    @property
    def plain(self) -> bool:
        """Equal tokens mean equal pages: nothing but tokens at positions 0..n-1 enters the model."""
        return self.prompt.position_ids is None and self.prompt.embeddings_TE is None

    def emit(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if self.on_delta is not None:
            self.on_delta(delta)

    def _answer(self, text: str) -> str:
        if self.done:
            for transform in reversed(self.transforms):
                text = transform.on_answer(self.prompt, text)
        return text

    def completion(self) -> Completion:
        """What the request produced (so far, if it is not done)."""
        now = self.finished_at if self.finished_at is not None else time.perf_counter()
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        start = self.submitted_at
        error = None if self.failure is None else str(self.failure)
        return Completion(
            prompt_token_ids=tuple(self.prompt.token_ids),
            samples=tuple(
                Sample(
                    tuple(s.output_ids),
                    self._answer(s.text.text),
                    s.finish or FinishReason.CANCELLED,
                    tuple(s.logprobs),
                    error if s.finish is FinishReason.ERROR else None,
                )
                for s in self.sequences
            ),
            timing=Timing(started - start, first - start, now - start),
            cached_tokens=self.ledger.cached,
            speculation=self.ledger.speculation,
        )
