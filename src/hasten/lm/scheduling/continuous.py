"""The default scheduler: continuous batching with chunked prefill, priorities and preemption by recomputation.

Every step runs the decoding sequences first (one row each, or a draft), then fills the row budget with prefill
chunks, first come first served within a priority (Orca, OSDI 2022, section 4; Sarathi, arXiv 2308.16369, section 4).
A sequence is admitted when its whole prompt fits into free pages, so half-computed prompts cannot block each other.
When a running sequence needs a page and none is left, the one that would run last loses its pages and waits; its
tokens, sampling state and text stay, so it goes on where it was.
"""

from __future__ import annotations

from bisect import insort

from hasten.lm.kvcache.cache import KVCache
from hasten.lm.scheduling.scheduler import Scheduler, Work
from hasten.lm.sequence import Sequence, Status
from hasten.lm.settings import EngineSettings


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.key


class ContinuousBatching(Scheduler):
    """First come, first served within a priority; see the module's text."""

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        super().bind(cache, settings)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> list[Sequence]:
        return self._waiting

    @property
    def running(self) -> list[Sequence]:
        return self._running

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=_order)

    def adopt(self, sequence: Sequence) -> bool:
        if self.cache.free_rows == 0:
            return False
        assert sequence.kv is not None
        self.cache.attach(sequence.kv)
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=_order)
        return True

    def remove(self, sequence: Sequence) -> None:
        queue = self._running if sequence.status is Status.RUNNING else self._waiting
        if sequence in queue:
            queue.remove(sequence)

    def schedule(self) -> list[Work]:
        work: dict[Sequence, Work] = {}
        room = self.settings.max_step_tokens
        decoding = [s for s in self._running if s.computed == len(s.token_ids) - 1]
        prefilling = [s for s in self._running if s.computed < len(s.token_ids) - 1]
        short = False
        for sequence in decoding + prefilling:
            if room == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # lost its pages to one before it
            if sequence.draft is not None and sequence.remaining > room:
                sequence.draft = None
            count = min(sequence.remaining, room)
            start = sequence.computed
            assert sequence.kv is not None
            while not self.cache.reserve(sequence.kv, start, start + count):
                short = True
                if sequence.draft is not None:  # give up the guess before anybody's pages
                    sequence.draft, count = None, 1
                    continue
                victim = self._victim()
                lost = work.pop(victim, None)
                room += 0 if lost is None else lost.count
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING:
                work[sequence] = Work(sequence, start, count)
                room -= count
        if not short:
            self._admit(work, room)
        return list(work.values())

    def _admit(self, work: dict[Sequence, Work], room: int) -> None:
        """Start waiting sequences, in order, until rows, budget or pages run out."""
        i = 0
        while i < len(self._waiting) and room > 0 and self.cache.free_rows > 0:
            sequence = self._waiting[i]
            if self._soon_shared(sequence, work):
                i += 1
                continue
            opened = sequence.kv is None
            if sequence.kv is None:
                tokens = sequence.token_ids if sequence.request.plain else ()
                sequence.kv = self.cache.open(sequence.id, tokens)
            start = sequence.computed
            # A page more than the tokens need: who was preempted should not be so again at once.
            ahead = min(len(sequence.token_ids) + self.cache.page_size, self.cache.context)
            if not self.cache.reserve(sequence.kv, start, ahead):
                if opened:
                    self.cache.close(sequence.kv)
                    sequence.kv = None
                if self._running or not self._drop_last_waiting(sequence):
                    return
                continue
            if opened:
                sequence.request.ledger.cached += min(start, sequence.prompt_length)
            self.cache.attach(sequence.kv)
            del self._waiting[i]
            sequence.status = Status.RUNNING
            insort(self._running, sequence, key=_order)
            count = min(sequence.remaining, room)
            work[sequence] = Work(sequence, start, count)
            room -= count

    def _soon_shared(self, sequence: Sequence, work: dict[Sequence, Work]) -> bool:
        """Whether another sequence computes, in this very step, pages that this one could reuse in the next."""
        if not self.settings.prefix_cache or sequence.kv is not None or not sequence.request.plain:
            return False
        size = self.cache.page_size
        most = (len(sequence.token_ids) - 1) // size * size
        best = 0
        for item in work.values():
            other = item.sequence
            if item.count < size or not other.request.plain:
                continue
            whole = min(most, item.stop // size * size)
            if whole > best and other.token_ids[:whole] == sequence.token_ids[:whole]:
                best = whole
            elif other.token_ids[:size] == sequence.token_ids[:size]:
                best = max(best, _common(other.token_ids, sequence.token_ids, whole) // size * size)
        return best > 0 and best > len(self.cache.store.match(sequence.token_ids[:best])) * size

    def _victim(self) -> Sequence:
        """Who gives up pages: a waiting sequence that holds some, else the running one that comes last."""
        holding = [s for s in self._waiting if s.kv is not None]
        return holding[-1] if holding else self._running[-1]

    def _drop_last_waiting(self, but: Sequence) -> bool:
        """Free the pages of the last waiting sequence that holds any (a fork that never ran)."""
        for sequence in reversed(self._waiting):
            if sequence.kv is not None and sequence is not but:
                self._preempt(sequence)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
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


def _common(a: list[int], b: list[int], limit: int) -> int:
    """Length of the common prefix of two token lists, at most ``limit``."""
    low, high = 0, limit
    while low < high:  # bisect over slice comparisons: they run at C speed
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
