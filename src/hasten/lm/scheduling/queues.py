"""What schedulers that own their queues share: admission, growth, preemption by recomputation.

`QueueScheduler` keeps two lists, sequences that wait and sequences that run, both in the order in which they would
run. A subclass says in `plan` which of them a step runs, by calling `grow`, `admit` and `preempt`.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from hasten.lm.kvcache.cache import KVCache
from hasten.lm.scheduling.prefix_tree import common_prefix
from hasten.lm.scheduling.scheduler import Scheduler, Work
from hasten.lm.sequence import Sequence, Status
from hasten.lm.settings import EngineSettings


@dataclass
class Step:
    """The step being planned: rows that are left, work so far, and whether somebody found no page."""

    room: int
    work: dict[Sequence, Work] = field(default_factory=dict)
    short: bool = False

    def give(self, sequence: Sequence, start: int, count: int) -> None:
        self.work[sequence] = Work(sequence, start, count)
        self.room -= count

    def take_back(self, sequence: Sequence) -> None:
        lost = self.work.pop(sequence, None)
        self.room += 0 if lost is None else lost.count


class QueueScheduler(Scheduler):
    """Base of schedulers that differ in what a step holds only."""

    @property
    def repairs(self) -> bool:
        # Running sequences get their rows from `grow`; a subclass with its own ``schedule`` may know nothing of it.
        return type(self).schedule is QueueScheduler.schedule

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        super().bind(cache, settings)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.budget = settings.max_step_tokens
        self._arrangement = cache.store.admission_order()

    @property
    def waiting(self) -> list[Sequence]:
        return self._waiting

    @property
    def running(self) -> list[Sequence]:
        return self._running

    def order(self, sequence: Sequence) -> tuple[int, ...]:
        """Smaller runs first: priority, then first come, first served."""
        return sequence.key

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=self.order)

    def adopt(self, sequence: Sequence) -> bool:
        if self.cache.free_rows == 0:
            return False
        assert sequence.kv is not None
        self.cache.attach(sequence.kv)
        self._run(sequence)
        return True

    def remove(self, sequence: Sequence) -> None:
        queue = self._running if sequence.status is Status.RUNNING else self._waiting
        if sequence in queue:
            queue.remove(sequence)

    def schedule(self) -> list[Work]:
        step = Step(self.budget)
        self.plan(step)
        return list(step.work.values())

    @abstractmethod
    def plan(self, step: Step) -> None:
        """Fill the step."""

    # -- what a plan is made of ----------------------------------------------------------------------------------

    def decoding(self) -> list[Sequence]:
        """Running sequences whose prompt is read."""
        return [s for s in self._running if s.computed == len(s.token_ids) - 1]

    def reading(self) -> list[Sequence]:
        """Running sequences whose prompt is not yet read."""
        return [s for s in self._running if s.computed < len(s.token_ids) - 1]

    def grow(self, sequences: Iterable[Sequence], step: Step, *, evict: bool = True) -> None:
        """Rows of running sequences, in order, until the step is full.

        Who needs a page when none is left gives up its draft, then takes it from the one that would run last; without
        ``evict`` it is left out of the step instead.
        """
        for sequence in sequences:
            if step.room == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # lost its pages to one before it
            stale = self.stale(sequence)
            if sequence.draft is not None and (sequence.remaining > step.room or stale is not None):
                sequence.draft = None
            start = sequence.computed if stale is None else stale
            if stale is None:
                count = self.rows(sequence, start, step)
            else:
                count = min(sequence.computed - stale, step.room)
            if count == 0:
                break
            assert sequence.kv is not None
            while not self.cache.reserve(sequence.kv, start, start + count):
                step.short = True
                if self.spare():
                    continue
                if sequence.draft is not None:  # give up the guess before anybody's pages
                    sequence.draft, count = None, 1
                    continue
                if not evict:
                    count = 0
                    break
                victim = self.victim()
                step.take_back(victim)
                self.preempt(victim)
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING and count > 0:
                step.give(sequence, start, count)

    def admit(self, step: Step, *, whole: bool = False) -> None:
        """Start waiting sequences, in order, until rows, budget or pages run out.

        The pages of a whole prompt are reserved when it starts, so that half-read prompts cannot block each other.
        whole: no prompt is cut to fit beside others; one that exceeds the budget is cut only where it runs alone.
        """
        if step.room == 0 or self.cache.free_rows == 0:
            return
        queue = list(self._waiting if self._arrangement is None else self._arrangement.arrange(self._waiting))
        i = 0
        while i < len(queue) and step.room > 0 and self.cache.free_rows > 0:
            sequence = queue[i]
            if self._soon_shared(sequence, step):
                i += 1
                continue
            if self.start(sequence, step, whole=whole):
                del queue[i]
                continue
            if self._running or not self._drop_last_waiting(sequence):
                if self._running or self._arrangement is None:
                    return
                i += 1  # nothing runs, and this one cannot; one behind it might

    def start(self, sequence: Sequence, step: Step, *, whole: bool = False) -> bool:
        """Let a waiting sequence run, with rows in this step. False, and nothing changed, if it finds no room."""
        opened = sequence.kv is None
        if sequence.kv is None:
            tokens = sequence.token_ids if sequence.request.plain else ()
            sequence.kv = self.cache.open(
                sequence.id, tokens, segments=sequence.segments, states=sequence.request.prompt.states
            )
        start = sequence.computed
        # A page more than the tokens need: who was preempted should not be so again at once.
        ahead = min(len(sequence.token_ids) + self.cache.page_size, self.cache.context)
        count = self.rows(sequence, start, step)
        fits = count > 0 and (not (whole and step.work) or sequence.remaining <= step.room)
        if not fits or not self._reserve(sequence, start, ahead):
            if opened:
                self.cache.close(sequence.kv)
                sequence.kv = None
            return False
        if opened:
            sequence.request.ledger.cached += min(start, sequence.prompt_length)
        self.cache.attach(sequence.kv)
        self.unqueue(sequence)
        if self._arrangement is not None:
            self._arrangement.admitted(sequence, self._waiting)
        self._run(sequence)
        step.give(sequence, start, count)
        return True

    def rows(self, sequence: Sequence, start: int, step: Step) -> int:
        """Rows that a sequence gets of the step's room: up to its end, or to the last multiple of the cache's grid.

        0 if that is no row; but not for the first prompt of a step, which must go on.
        """
        grid, room = self.cache.grid, step.room
        if sequence.remaining <= room or grid == 1:
            return min(sequence.remaining, room)
        first = not any(item.count > 1 and item.sequence.draft is None for item in step.work.values())
        return max(0, (start + room) // grid * grid - start) or (room if first else 0)

    def spare(self) -> bool:
        """Give up pages that are only kept in advance; whether there were any."""
        return False

    def unqueue(self, sequence: Sequence) -> None:
        """A sequence does not wait any more."""
        self._waiting.remove(sequence)

    def holders(self) -> list[Sequence]:
        """Waiting sequences that hold pages."""
        return [s for s in self._waiting if s.kv is not None]

    def victim(self) -> Sequence:
        """Who gives up pages: a waiting sequence that holds some, else the running one that comes last."""
        holding = self.holders()
        return holding[-1] if holding else self._running[-1]

    def preempt(self, sequence: Sequence) -> None:
        """Take the pages away. What the prefix store can keep it keeps, until somebody needs the room."""
        assert sequence.kv is not None
        if sequence.request.plain:
            self.cache.offer_prefix(sequence.kv, sequence.token_ids)
        self.cache.close(sequence.kv)
        sequence.kv = sequence.draft = None
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            sequence.request.ledger.preemptions += 1
            self.add(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=self.order)

    def _soon_shared(self, sequence: Sequence, step: Step) -> bool:
        """Whether another sequence computes, in this very step, pages that this one could reuse in the next."""
        if not self.settings.prefix_cache or sequence.kv is not None or not sequence.request.plain:
            return False
        size, store = self.cache.page_size, self.cache.store
        most = (len(sequence.token_ids) - 1) // size * size
        best = 0
        for item in step.work.values():
            other = item.sequence
            if item.count < size or not other.request.plain:
                continue
            whole = min(most, store.cut(item.stop, other.segments, after=True))
            if whole > best and other.token_ids[:whole] == sequence.token_ids[:whole]:
                best = whole
            elif other.token_ids[:size] == sequence.token_ids[:size]:
                best = max(best, common_prefix(other.token_ids, sequence.token_ids, whole) // size * size)
        best = store.cut(best, sequence.segments)
        return best > 0 and best > store.cached(sequence.token_ids[:best], sequence.segments)

    def _drop_last_waiting(self, but: Sequence) -> bool:
        """Free the pages of the last waiting sequence that holds any (a fork that never ran)."""
        others = [sequence for sequence in self.holders() if sequence is not but]
        if others:
            self.preempt(others[-1])
        return bool(others)

    def _reserve(self, sequence: Sequence, start: int, stop: int) -> bool:
        assert sequence.kv is not None
        while not self.cache.reserve(sequence.kv, start, stop):
            if not self.spare():
                return False
        return True
