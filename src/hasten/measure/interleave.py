"""Two sessions, run in turn: A B B A A B B A ... so that neither side always follows the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hasten.measure.statistics import Interval, Stopping, median_interval
from hasten.workloads.workload import Run

Side = Literal["baseline", "candidate"]


class Runner(Protocol):
    """What `measure_pairs` needs of a side; `hasten.measure.process.SessionProcess` is one."""

    def run(self) -> Run: ...


@dataclass
class Pairs:
    """Timed runs in pairs: ``baseline[i]`` and ``candidate[i]`` ran back to back, ``first[i]`` began."""

    baseline: list[Run] = field(default_factory=list)
    candidate: list[Run] = field(default_factory=list)
    first: list[Side] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Speed of the candidate over speed of the baseline, pair by pair (speed = units / seconds)."""
        return [
            (c.units / c.seconds) / (b.units / b.seconds)
            for b, c in zip(self.baseline, self.candidate, strict=True)
        ]

    def interval(self) -> Interval:
        return median_interval(self.ratios)


def warm_up(baseline: Runner, candidate: Runner, times: int) -> None:
    """Run both sides ``times`` times, untimed."""
    for _ in range(times):
        baseline.run()
        candidate.run()


def measure_pairs(
    baseline: Runner,
    candidate: Runner,
    stopping: Stopping,
    on_pair: Callable[[Pairs], None] = lambda pairs: None,
) -> Pairs:
    """Run pairs until ``stopping`` is content. ``on_pair`` sees the pairs so far after each one."""
    pairs = Pairs()
    began = time.monotonic()
    while not stopping.done(pairs.ratios, time.monotonic() - began):
        baseline_first = len(pairs.first) % 2 == 0
        if baseline_first:
            b, c = baseline.run(), candidate.run()
        else:
            c, b = candidate.run(), baseline.run()
        pairs.baseline.append(b)
        pairs.candidate.append(c)
        pairs.first.append("baseline" if baseline_first else "candidate")
        on_pair(pairs)
    return pairs
