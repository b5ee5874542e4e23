"""The order in which waiting sequences are admitted, where that is not the order in which they came.

`CacheAware` is RAGCache's reordering (Jin et al., 2024, arXiv 2404.12457, section 5.2): sequences of which much is
stored and little is to be computed go first, so that those that share documents run one after the other while the
documents are cached. A sequence can be overtaken only so often.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.lm.kvcache.prefix import PrefixStore
    from hasten.lm.sequence import Sequence


class AdmissionOrder(ABC):
    """Asked by the scheduler before it admits; see `PrefixStore.admission_order`."""

    @abstractmethod
    def arrange(self, waiting: SequenceOf[Sequence]) -> SequenceOf[Sequence]:
        """The same sequences in the order in which to admit them. ``waiting`` is by priority, then by arrival."""

    def admitted(self, sequence: Sequence, waiting: SequenceOf[Sequence]) -> None:
        """``sequence`` was admitted; ``waiting`` still wait."""


class CacheAware(AdmissionOrder):
    """Largest cached / computed first, among sequences of one priority.

    window: how many later ones of its priority may be admitted before a sequence; then it goes first. Only the first
    ``window + 1`` sequences of the queue are looked at, so that arranging costs the same however long it is.
    """

    def __init__(self, store: PrefixStore, window: int) -> None:
        self.store, self.window = store, window
        self._overtaken: dict[int, int] = {}  # by sequence id

    def arrange(self, waiting: SequenceOf[Sequence]) -> SequenceOf[Sequence]:
        if len(waiting) < 2:
            return waiting
        near, rest = waiting[: self.window + 1], waiting[self.window + 1 :]
        return [*sorted(near, key=self._rank), *rest]

    def _rank(self, sequence: Sequence) -> tuple[int, bool, float]:
        priority = sequence.key[0]
        if self._overtaken.get(sequence.id, 0) >= self.window:
            return priority, False, 0.0  # the sort is stable: as they came
        return priority, True, -self.order_priority(sequence)

    def order_priority(self, sequence: Sequence) -> float:
        """Tokens that are cached, in any tier, over tokens to compute."""
        ids = sequence.token_ids
        if sequence.kv is not None:
            cached = sequence.kv.length
        elif sequence.request.plain:
            cached = self.store.cached(ids[: len(ids) - 1], sequence.segments)
        else:
            cached = 0
        return cached / (len(ids) - cached)

    def admitted(self, sequence: Sequence, waiting: SequenceOf[Sequence]) -> None:
        self._overtaken.pop(sequence.id, None)
        for other in waiting:
            if other.key[0] == sequence.key[0] and other.key < sequence.key:
                self._overtaken[other.id] = self._overtaken.get(other.id, 0) + 1
        if len(self._overtaken) > 4 * len(waiting) + 64:  # of sequences that were cancelled
            alive = {other.id for other in waiting}
            self._overtaken = {i: n for i, n in self._overtaken.items() if i in alive}
