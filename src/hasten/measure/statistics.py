"""Median of paired ratios with a bootstrap interval, and when to stop measuring.

Runs are paired (one of each side, back to back), so what drifts slowly (clock, temperature, neighbours)
cancels in each pair's ratio; the median of the ratios ignores the occasional disturbed pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from hasten.core.errors import MeasureError

# The widest statement n pairs allow about their median is [min, max], which covers it with probability
# 1 - 2 * 0.5**n: 93.75% for five pairs, 96.9% for six. Below six there is no 95% interval.
MIN_PAIRS = 6
_RESAMPLES = 10_000

PositiveRatio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Interval:
    """A ratio: median of ``pairs`` paired ratios and its 95% bootstrap interval [low, high]."""

    median: PositiveRatio
    low: PositiveRatio
    high: PositiveRatio
    pairs: int

    @property
    def half_width(self) -> float:
        """Half the interval relative to the median (0.02 = "plus or minus two percent")."""
        return (self.high - self.low) / 2 / self.median

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "pairs": self.pairs}


def median_interval(
    ratios: Sequence[float], *, confidence: float = 0.95, seed: int = 0, min_pairs: int = MIN_PAIRS
) -> Interval:
    """Median of ``ratios`` [pairs] with its percentile-bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Deterministic for a given ``seed``. Raises `MeasureError` for fewer than ``min_pairs`` ratios or one that
    is not a positive finite number.
    """
    if len(ratios) < min_pairs:
        raise MeasureError(
            f"{len(ratios)} pairs are too few for a {confidence:.0%} interval of a median; "
            f"measure at least {min_pairs}"
        )
    values = np.asarray(ratios, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        bad = next(r for r in ratios if not (math.isfinite(r) and r > 0))
        raise MeasureError(f"a pair has ratio {bad!r}: every run must take a positive, finite time")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(_RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Interval(float(np.median(values)), float(low), float(high), len(values))


@dataclass(frozen=True)
class Stopping:
    """When enough pairs have been measured.

    At least ``min_pairs``; then until the interval's relative `Interval.half_width` is at most
    ``half_width``, ``max_pairs`` are done or ``seconds`` have passed. Stopping on the width (not on the
    ratio) favours neither side; it makes intervals slightly optimistic, which `Stopping.fixed` avoids.
    """

    min_pairs: int = MIN_PAIRS
    max_pairs: int = 25
    half_width: float = 0.02
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.min_pairs < MIN_PAIRS:
            raise MeasureError(
                f"{self.min_pairs} pairs are too few for a 95% interval of a median; "
                f"measure at least {MIN_PAIRS}"
            )
        if self.max_pairs < self.min_pairs:
            raise MeasureError(f"max_pairs = {self.max_pairs} is below min_pairs = {self.min_pairs}")
        if not self.half_width >= 0:
            raise MeasureError(f"half_width = {self.half_width!r}: must be 0 or more")
        if self.seconds is not None and not self.seconds > 0:
            raise MeasureError(f"seconds = {self.seconds!r}: a time budget must be positive")

    @classmethod
    def fixed(cls, pairs: int) -> Stopping:
        """Exactly ``pairs`` pairs."""
        return cls(min_pairs=pairs, max_pairs=pairs)

    def done(self, ratios: Sequence[float], elapsed: float) -> bool:
        """Whether to stop after ``ratios``, ``elapsed`` seconds after the first timed run began."""
        if len(ratios) < self.min_pairs:
            return False
        if len(ratios) >= self.max_pairs or (self.seconds is not None and elapsed >= self.seconds):
            return True
        return median_interval(ratios, min_pairs=self.min_pairs).half_width <= self.half_width
