"""What every engine answers: greedy generation with its times, and scoring where logits can be seen."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.core.errors import MeasureError, UnsupportedError


@dataclass(frozen=True)
class Limits:
    """What a process must be able to do, so that every engine reserves the same.

    files: paths by kind (``model``, ``gguf``, ``hf``, ``ct2``), those that exist. context: prompt plus new tokens of
    one sequence. batch: sequences at once. prefix_cache: whether prompts' states may be reused. use: hasten's
    techniques, as slugs.
    """

    files: Mapping[str, str]
    threads: int
    context: int
    batch: int = 1
    prefix_cache: bool = False
    use: tuple[str, ...] = ()

    def file(self, kind: str) -> str:
        if kind not in self.files:
            raise UnsupportedError(f"this engine reads {kind} files and this model is none")
        return self.files[kind]


@dataclass
class Answer:
    """Greedy continuations. Seconds from submission: ``first`` until every prompt has its first token, ``total``
    until the last token of all; ``late`` new tokens came after ``first``."""

    tokens: list[list[int]]
    first: float
    total: float
    late: int


@dataclass
class Clock:
    """Notes tokens as they come and makes an `Answer` of them."""

    prompts: int
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(self.prompts)]
        self._times: list[list[float]] = [[] for _ in range(self.prompts)]

    def hear(self, prompt: int, tokens: Sequence[int]) -> None:
        now = time.perf_counter()
        self._tokens[prompt] += [int(token) for token in tokens]
        self._times[prompt] += [now] * len(tokens)

    def answer(self, wanted: int) -> Answer:
        """Raises `MeasureError` unless every prompt got exactly ``wanted`` tokens."""
        for number, tokens in enumerate(self._tokens):
            if len(tokens) != wanted:
                raise MeasureError(f"prompt {number} got {len(tokens)} new tokens instead of {wanted}")
        first = max(times[0] for times in self._times)
        total = max(times[-1] for times in self._times)
        late = sum(when > first for times in self._times for when in times)
        return Answer(self._tokens, first - self.began, total - self.began, late)


class Engine(ABC):
    """An engine with a model loaded within `Limits`."""

    def __init__(self, limits: Limits) -> None:
        """Load; raises `UnsupportedError` with the reason when it cannot."""
        self.limits = limits

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        """Exactly ``tokens`` greedy tokens for each prompt, all prompts together; the end token is one like any other.

        shared: how many leading tokens all prompts have in common, for engines that must be told.
        """

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        """Natural log-probability of each text's tokens from index ``context`` (at least 1) on."""
        raise UnsupportedError("its interface shows no logits of given tokens")

    def bandwidth(self) -> float:
        """Bytes a second read from memory by this engine's threads."""
        raise UnsupportedError("it does not measure the memory")

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """``version`` and ``settings``, one line each: what would have to be typed to run the same."""
