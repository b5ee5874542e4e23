"""Schedulers that see the whole job before its first request runs, and choose an order.

`OfflineScheduler` collects what is submitted, puts it in order when it is first asked for work, and admits from that
order; steps are those of continuous batching. What comes later is put in order when it is a good part of what waits, or
when nothing else is left. Priorities play no part: a job has one deadline.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hasten.core.technique import Technique
from hasten.lm.scheduling.prefix_tree import Entry, dfs_order, order_by
from hasten.lm.scheduling.queues import QueueScheduler, Step
from hasten.lm.sequence import Sequence, Status

if TYPE_CHECKING:
    from hasten.lm.kvcache.cache import KVCache
    from hasten.lm.scheduling.scheduler import Scheduler
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext

_LATE = 8  # late requests are put in order when they are more than one in so many of those that wait


class OfflineScheduler(QueueScheduler):
    """Base: which request starts next is a matter of the job, not of its arrival.

    job: the requests of the last ordering; a subclass refers to them by index.
    """

    offline = True

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        super().bind(cache, settings)
        self._crowd: dict[Sequence, None] = {}  # everybody who waits; a list would be slow to leave
        self._late: dict[Sequence, None] = {}  # of these, who is in no order yet
        self._back: deque[Sequence] = (
            deque()
        )  # of these, who starts before all others: preempted, or holding pages
        self.job: list[Sequence] = []

    @property
    def waiting(self) -> list[Sequence]:
        return list(self._crowd)

    def add(self, sequence: Sequence) -> None:
        preempted = sequence.status is Status.RUNNING
        sequence.status = Status.WAITING
        self._crowd[sequence] = None
        if preempted or sequence.kv is not None:
            self._back.append(sequence)
        else:
            self._late[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            super().remove(sequence)
        elif sequence in self._crowd:
            self.unqueue(sequence)

    def unqueue(self, sequence: Sequence) -> None:
        del self._crowd[sequence]
        self._late.pop(sequence, None)
        if sequence in self._back:
            self._back.remove(sequence)

    def holders(self) -> list[Sequence]:
        return [sequence for sequence in self._back if sequence.kv is not None]

    def plan(self, step: Step) -> None:
        self.grow(self.decoding(), step)
        self.limit(step)
        self.grow(self.reading(), step)
        if step.short or not self._crowd:
            return
        while self._back and step.room > 0 and self.cache.free_rows > 0:
            if not self.start(self._back[0], step) and (
                self._running or not self._drop_last_waiting(self._back[0])
            ):
                return
        ordered = len(self._crowd) - len(self._late) - len(self._back)
        if self._late and (ordered == 0 or len(self._late) * _LATE > len(self._crowd)):
            self.job = [s for s in self._crowd if s not in self._back]
            self._late.clear()
            self.arrange([entry(sequence) for sequence in self.job])
        self.choose(step)

    def limit(self, step: Step) -> None:
        """Lower ``step.room`` to the prompt rows that a step with these decode rows should hold."""

    @abstractmethod
    def arrange(self, entries: list[Entry]) -> None:
        """Put the job in order; ``entries[i]`` describes ``job[i]``. All of it waits."""

    @abstractmethod
    def choose(self, step: Step) -> None:
        """Start requests of the job in the order chosen, by `start`, while they find room."""

    def startable(self, sequence: Sequence) -> bool:
        """Whether a request of the job still waits (it may have been cancelled, or run already)."""
        return sequence in self._crowd


def entry(sequence: Sequence) -> Entry:
    """What ordering may know of a sequence. One with positions or embeddings of its own shares nothing."""
    return Entry(sequence.token_ids, shares=sequence.request.plain)


Order = Literal["dfs", "random", "shortest", "longest"]


class OfflineOrder(Technique):
    """The requests of a job in a fixed order: along the prefix tree, at random, shortest or longest prompt first."""

    slug: ClassVar[str] = "offline_order"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True

    order: Order = Field(
        "dfs", description="dfs (a walk through the prefix tree), random, shortest or longest"
    )
    seed: int = Field(0, ge=0, description="of the random order")

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return FixedOrder(self)


class FixedOrder(OfflineScheduler):
    """One cursor through one order."""

    def __init__(self, settings: OfflineOrder) -> None:
        self.chosen = settings
        self._next: deque[int] = deque()

    def arrange(self, entries: list[Entry]) -> None:
        match self.chosen.order:
            case "dfs":
                found = dfs_order(entries, self.cache.page_size)
            case "random":
                rng = random.Random(self.chosen.seed)
                found = order_by(entries, lambda _: rng.random())
            case "shortest":
                found = order_by(entries, lambda entry: len(entry.tokens))
            case "longest":
                found = order_by(entries, lambda entry: -len(entry.tokens))
        self._next = deque(found)

    def choose(self, step: Step) -> None:
        while self._next and step.room > 0 and self.cache.free_rows > 0:
            sequence = self.job[self._next[0]]
            if self.startable(sequence) and (
                self._soon_shared(sequence, step) or not self.start(sequence, step)
            ):
                return
            self._next.popleft()
