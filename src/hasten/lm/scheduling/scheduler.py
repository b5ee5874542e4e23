"""Slot ``scheduler``: what runs in the next step.

The engine adds sequences and removes those that ended; before every step it asks `Scheduler.schedule` for work. The
scheduler owns the queue, the rows of the page table and the pages of its sequences: it opens, attaches, reserves and,
when pages run out, takes them away again (`Sequence.kv` closed, the sequence computed anew later).

A scheduler may also ask for tokens to be computed again in place: a `Work` whose ``start`` lies before what is cached
(after `KVCache.reserve` of the range, which copies shared pages). It has to where the attention policy repairs: a
sequence whose `Scheduler.stale` is a token does nothing else before it is computed again from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.attention.policy import AttentionPolicy
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.repair import repair_from
from hasten.lm.sequence import Sequence
from hasten.lm.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hasten.lm.runner import Runner


@dataclass(frozen=True)
class Work:
    """Rows of one sequence for the next step: ``count`` tokens (draft included) from token ``start`` on.

    The sequence is attached and its slots are reserved. At most one `Work` per sequence and step.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


class Scheduler(ABC):
    """Picks the work of each step. One instance per engine; calls come from one thread.

    stalls: whether decoding may stand still while a prompt is read (what is built to be fair does not).
    offline: whether it wants to know all requests of a job before the first of them runs.
    policy: the engine's attention policy, set before `bind`.
    """

    stalls: ClassVar[bool] = False
    offline: ClassVar[bool] = False
    policy: AttentionPolicy | None = None

    @property
    def repairs(self) -> bool:
        """Whether `schedule` heeds `stale`; a plan whose policy repairs needs a scheduler that does."""
        return False

    def stale(self, sequence: Sequence) -> int | None:
        """The first token that has to be computed again, up to the last cached one; None: the sequence may go on."""
        repair = None if self.policy is None else self.policy.repair
        if repair is None or sequence.kv is None:
            return None
        return repair_from(sequence.kv, repair, sequence.phase)

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        """Called once before anything else."""
        self.cache = cache
        self.settings = settings

    def calibrate(self, runner: Runner) -> None:
        """Called once by the engine after `bind`, before any request: who needs to know what steps cost measures."""

    def facts(self) -> Mapping[str, Any]:
        """Figures for `LLM.facts`, e.g. what was calibrated; JSON-able."""
        return {}

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """A sequence wants to run; it may already hold pages (``sequence.kv``)."""

    @abstractmethod
    def adopt(self, sequence: Sequence) -> bool:
        """A fork that could run in the very next step (its ``kv`` is complete but for the last token).

        False if there is no room; the engine then drops its pages and adds it like any other.
        """

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended or was cancelled. Its pages are closed by the engine."""

    @abstractmethod
    def schedule(self) -> list[Work]:
        """The next step: at most ``max_step_tokens`` rows. Empty when nothing can run."""

    @property
    @abstractmethod
    def waiting(self) -> SequenceOf[Sequence]:
        """Sequences that wait, in the order in which they would run."""

    @property
    @abstractmethod
    def running(self) -> SequenceOf[Sequence]:
        """Sequences that run."""
