"""The last published comparison of a system, as ``benchmarks/results/<slug>.json`` of a source checkout holds it.

`hasten.measure.Comparison` writes these files. Its room lies above this one, so the few fields that a card prints are
read here on their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.errors import HastenError


@dataclass(frozen=True)
class Published:
    """What a card prints. Ratios are candidate over baseline (2.0 = twice as fast); memory is peak MiB of each side.

    ``baseline`` and ``candidate`` are the plans' labels; ``machine`` is the processor's name; ``doubts`` say why the
    figure does not meet the rules for publishing (empty when it does).
    """

    system: str
    workload: str
    baseline: str
    candidate: str
    median: float
    low: float
    high: float
    pairs: int
    metric: str
    better: str
    quality_baseline: float
    quality_candidate: float
    baseline_mb: float
    candidate_mb: float
    machine: str
    commit: str
    doubts: tuple[str, ...] = ()

    @property
    def speed(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    @property
    def quality(self) -> str:
        return f"{self.metric} {self.quality_baseline:.4g} → {self.quality_candidate:.4g}"

    def headline(self) -> str:
        """The ratio with its interval and, always, the quality of both sides."""
        return f"{self.speed} · {self.quality}"


def read_published(path: Path) -> Published | None:
    """Read one result file; None when there is none. Raises `HastenError`, naming file and field, when it is broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HastenError(f"{path} cannot be read: {error}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise HastenError(f"{path} is not valid JSON: {error}") from None
    return _Reader(path, data).published()


class _Reader:
    def __init__(self, path: Path, data: Any) -> None:
        self.path, self.data = path, data

    def published(self) -> Published:
        system = self.text("system")
        if system != self.path.stem:
            raise HastenError(f"{self.path} holds a comparison of {system}, not of {self.path.stem}")
        better = self.text("quality", "better")
        if better not in ("higher", "lower"):
            raise HastenError(f"{self.path}: quality.better must be higher or lower, not {better!r}")
        return Published(
            system=system,
            workload=self.text("workload"),
            baseline=self.label("baseline"),
            candidate=self.label("candidate"),
            median=self.number("speedup", "median"),
            low=self.number("speedup", "low"),
            high=self.number("speedup", "high"),
            pairs=int(self.number("speedup", "pairs")),
            metric=self.text("quality", "metric"),
            better=better,
            quality_baseline=self.number("quality", "baseline"),
            quality_candidate=self.number("quality", "candidate"),
            baseline_mb=self.number("memory", "baseline_mb"),
            candidate_mb=self.number("memory", "candidate_mb"),
            machine=self.machine(),
            commit=self.text("commit"),
            doubts=tuple(str(reason) for reason in self.data.get("unpublishable", ())),
        )

    def at(self, *keys: str) -> Any:
        value = self.data
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise HastenError(f"{self.path} has no {'.'.join(keys)}")
            value = value[key]
        return value

    def text(self, *keys: str) -> str:
        value = self.at(*keys)
        if not isinstance(value, str) or not value:
            raise HastenError(f"{self.path}: {'.'.join(keys)} must be text, not {value!r}")
        return value

    def number(self, *keys: str) -> float:
        value = self.at(*keys)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise HastenError(f"{self.path}: {'.'.join(keys)} must be a finite number, not {value!r}")
        return float(value)

    def label(self, side: str) -> str:
        plan = self.at("plans", side)
        if isinstance(plan, Mapping):
            return str(plan.get("label", side))
        return self.text("plans", side)

    def machine(self) -> str:
        machine = self.at("machine")
        return self.text("machine", "cpu") if isinstance(machine, Mapping) else self.text("machine")
