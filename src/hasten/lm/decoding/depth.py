"""How many tokens to draft: as many as give the most tokens per second, by what was seen of this request and machine.

With a chance ``a`` that a guess is kept, ``k`` guesses yield ``(1 - a**(k+1)) / (1 - a)`` tokens a round (Leviathan et
al. 2023, arXiv 2211.17192, equation 1). They cost steps of the draft model, and a row each in the target's step; both
are measured while they run. Batched, the best common depth is found first; then a request whose last guesses are
worth less than the rows that verify them drafts fewer.

Legend: S sequences.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_PRIOR, _PRIOR_WEIGHT, _MEMORY = 0.7, 2.0, 0.9  # of the acceptance estimate; memory per round
_RECOVERY = 0.97  # per round without a guess: what was learnt fades, so that guessing is tried again
_KEPT = 9  # timings per number of rows; their median counts
_FRESH = 512  # steps


class Acceptance:
    """A running estimate of the chance that a guess is kept, given that the guesses before it were."""

    __slots__ = ("kept", "tried")

    def __init__(self) -> None:
        self.kept = self.tried = 0.0

    @property
    def chance(self) -> float:
        return (self.kept + _PRIOR * _PRIOR_WEIGHT) / (self.tried + _PRIOR_WEIGHT)

    def saw(self, drafted: int, accepted: int) -> None:
        """A round kept ``accepted`` of ``drafted`` guesses; those after the first rejection say nothing."""
        self.kept = _MEMORY * self.kept + accepted
        self.tried = _MEMORY * self.tried + min(accepted + 1, drafted)

    def fade(self) -> None:
        self.kept *= _RECOVERY
        self.tried *= _RECOVERY


class StepCosts:
    """Seconds of a step by its number of rows: medians of the latest timings, linear between what was measured.

    Steps grow with the texts they read, so a timing counts for `_FRESH` more steps.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # when the rows were timed last
        self._points: list[tuple[int, float]] = []
        self._steps = 0

    def add(self, rows: int, seconds: float) -> None:
        self._steps += 1
        self._seconds.setdefault(rows, deque(maxlen=_KEPT)).append(seconds)
        self._seen[rows] = self._steps
        for old in [r for r, seen in self._seen.items() if self._steps - seen > _FRESH]:
            del self._seconds[old], self._seen[old]
        self._points = sorted((r, median(s)) for r, s in self._seconds.items())

    def known(self, low: int, high: float = math.inf) -> bool:
        """Whether a number of rows in [low, high] was measured."""
        return any(low <= rows <= high for rows, _ in self._points)

    def at(self, rows: int) -> float:
        """The expected seconds; 0 when nothing was measured. More rows never cost less, fewer never cost more."""
        points = self._points
        if not points:
            return 0.0
        right = next((i for i, (r, _) in enumerate(points) if r >= rows), len(points))
        if right == 0:
            return points[0][1]
        (r0, s0), (r1, s1) = points[right - 1], points[right] if right < len(points) else points[-1]
        if right == len(points):  # beyond what was measured: by the mean cost of a row so far
            first = points[0]
            slope = max(0.0, (s0 - first[1]) / (r0 - first[0])) if r0 > first[0] else 0.0
            return s0 + slope * (rows - r0)
        return s0 + max(0.0, s1 - s0) * (rows - r0) / (r1 - r0)


class Depth:
    """Chooses draft lengths. ``target`` and ``draft`` learn what steps cost (``draft`` stays empty without a model)."""

    def __init__(self, drafts_cost: bool) -> None:
        self.target, self.draft = StepCosts(), StepCosts()
        self._drafts_cost = drafts_cost

    def choose(self, chance_S: Sequence[float], limit_S: Sequence[int]) -> list[int]:
        """Tokens to draft for each sequence, 0 to its limit.

        What was never timed is tried once: plain steps, drafts, and for a single sequence every length, since kernels
        work in tiles of rows and the fifth row may cost what the three before it did not.
        """
        count = len(limit_S)
        if not self.target.known(1, count):
            return [0] * count
        if not self.target.known(count + 1) or (self._drafts_cost and not self.draft.known(1)):
            return list(limit_S)
        if count == 1:
            new = [k for k in range(limit_S[0], 0, -1) if not self.target.known(k + 1, k + 1)]
            if new:
                return new[:1]
        best, best_rate = 0, 0.0
        for depth in range(max(limit_S, default=0) + 1):
            rate = self._rate(chance_S, [min(depth, limit) for limit in limit_S], depth)
            if rate > best_rate:
                best, best_rate = depth, rate
        rows = count + sum(min(best, limit) for limit in limit_S)
        row = (self.target.at(rows) - self.target.at(count)) / max(1, rows - count)
        return [
            _worthwhile(a, min(best, limit), best_rate * row)
            for a, limit in zip(chance_S, limit_S, strict=True)
        ]

    def _rate(self, chance_S: Sequence[float], k_S: Sequence[int], depth: int) -> float:
        tokens = sum(_expected(a, k) for a, k in zip(chance_S, k_S, strict=True))
        seconds = self.target.at(len(k_S) + sum(k_S))
        seconds += sum(self.draft.at(sum(k > i for k in k_S)) for i in range(depth))
        return tokens / seconds if seconds > 0 else 0.0


def _expected(chance: float, k: int) -> float:
    """Tokens that a round with ``k`` guesses adds on average."""
    return k + 1.0 if chance >= 1 else (1 - chance ** (k + 1)) / (1 - chance)


def _worthwhile(chance: float, k: int, least: float) -> int:
    """The most guesses, at most ``k``, whose last is kept with a chance of ``least`` or more."""
    while k > 0 and chance**k < least:
        k -= 1
    return k
