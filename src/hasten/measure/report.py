"""One HTML page of everything measured: speed beside quality, claim beside measured. Self-contained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hasten.catalog import loader
from hasten.measure.comparison import Comparison

# The scatter plot in SVG user units.
_WIDTH, _HEIGHT = 760.0, 420.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 24.0, 52.0
_LABEL_GAP = 14.0


def render(comparisons: Iterable[Comparison], *, created: datetime | None = None) -> str:
    """The report as HTML text. Every string of a record is escaped; an empty report says what to run."""
    environment = Environment(
        loader=PackageLoader("hasten.measure", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = sorted(comparisons, key=lambda c: (c.system, c.workload, c.created))
    scale = RatioScale.of(found)
    rows = [_row(number, comparison, scale) for number, comparison in enumerate(found)]
    return environment.get_template("report.html.j2").render(
        rows=rows,
        plot=_plot(found, scale) if found else None,
        ticks=scale.ticks,
        machines=_machines(found),
        records=[comparison.to_dict() for comparison in found],
        created=(created or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
    )


@dataclass(frozen=True)
class RatioScale:
    """A logarithmic axis for speed ratios that always shows 1x."""

    low: float
    high: float

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> RatioScale:
        ends = [1.0, *(c.speedup.low for c in comparisons), *(c.speedup.high for c in comparisons)]
        return cls(min(min(ends) / 1.1, 0.8), max(max(ends) * 1.1, 1.6))

    def at(self, ratio: float) -> float:
        """Position of ``ratio`` in 0..1."""
        return math.log(ratio / self.low) / math.log(self.high / self.low)

    @property
    def ticks(self) -> list[float]:
        """Round ratios inside the scale: 1-2-5 steps, thinned to at most eight; 1x always among them."""
        steps: tuple[float, ...] = (0.5, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8)
        if self.high / self.low > 16:
            steps = tuple(m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5))
        inside = [s for s in steps if self.low <= s <= self.high]
        while len(inside) > 8:
            one = inside.index(1)
            inside = inside[one % 2 :: 2]
        return inside


def _row(number: int, c: Comparison, scale: RatioScale) -> dict[str, Any]:
    known = loader.records().get(c.system)
    change = c.quality.change
    return {
        "anchor": f"row-{number}",
        "system": c.system,
        "title": known.title if known else "",
        "workload": c.workload,
        "baseline": _plan_text(c, "baseline"),
        "candidate": _plan_text(c, "candidate"),
        "speedup": c.speedup,
        "bar": [round(scale.at(x) * 100, 2) for x in (c.speedup.low, c.speedup.median, c.speedup.high, 1.0)],
        "quality": c.quality,
        "change": None if change is None else round(change * 100, 3),
        "memory": c.memory,
        "memory_ratio": c.memory.candidate_mb / c.memory.baseline_mb if c.memory.baseline_mb else None,
        "claim": c.claim,
        "target": c.target,
        "model": c.model,
        "date": c.created[:10],
        "commit": (c.commit or "")[:10],
        "unpublishable": c.unpublishable,
        "options": ", ".join(f"{key} = {value}" for key, value in c.options.items()),
        "facts": {side: _facts(c.facts.get(side, {})) for side in ("baseline", "candidate")},
    }


def _plan_text(c: Comparison, side: str) -> str:
    return f"{c.label(side)}, {c.plans[side].get('dtype', '?')}"


def _facts(facts: Any) -> list[tuple[str, str]]:
    return [
        (name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in facts.items()
    ]


def _plot(comparisons: Sequence[Comparison], scale: RatioScale) -> dict[str, Any]:
    """Points, axes and labels of the scatter plot; a comparison without a relative change is left out."""
    placed = [
        (n, c, c.quality.change * 100) for n, c in enumerate(comparisons) if c.quality.change is not None
    ]
    changes = [0.0, *(change for _, _, change in placed)]
    pad = max((max(changes) - min(changes)) * 0.12, 0.5)
    low, high = min(changes) - pad, max(changes) + pad

    def x(ratio: float) -> float:
        return round(_LEFT + scale.at(ratio) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(change: float) -> float:
        return round(_TOP + (high - change) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    points = [
        {
            "anchor": f"row-{number}",
            "x": x(c.speedup.median),
            "low": x(c.speedup.low),
            "high": x(c.speedup.high),
            "y": y(change),
            "label": c.system,
            "text": f"{c.system} on {c.workload} against {_plan_text(c, 'baseline')}: {c.headline()}",
            "doubtful": bool(c.unpublishable),
        }
        for number, c, change in placed
    ]
    _spread_labels(points)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "x_ticks": [(x(tick), f"{tick:g}x") for tick in scale.ticks],
        "y_ticks": [(y(tick), f"{tick:+g}%" if tick else "0%") for tick in _round_ticks(low, high)],
        "one": x(1.0),
        "zero": y(0.0),
        "points": points,
        "left_out": len(comparisons) - len(placed),
    }


def _spread_labels(points: list[dict[str, Any]]) -> None:
    """Give each point a ``label_y`` such that labels which would overlap stand below one another."""
    done: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["y"], p["x"])):
        # Near the right edge the label stands to the left of its point.
        point["anchor_end"] = point["x"] > _WIDTH * 0.75
        point["label_y"] = point["y"] - 9
        near = [p for p in done if abs(p["x"] - point["x"]) < 150]
        while any(abs(p["label_y"] - point["label_y"]) < _LABEL_GAP for p in near):
            point["label_y"] += _LABEL_GAP
        done.append(point)


def _round_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About ``wanted`` round numbers in [low, high]."""
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _machines(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """Distinct machines with their facts as text, in order of appearance."""
    out: list[dict[str, str]] = []
    for c in comparisons:
        m = c.machine
        versions = m.get("versions", {})
        facts = {
            "CPU": m.get("cpu", "unknown"),
            "Instruction sets": " ".join(m.get("instruction_sets", [])),
            "Cores": f"{m.get('cores', '?')} ({m.get('threads', '?')} threads used)",
            "Memory": f"{m.get('memory_mb', 0) / 1024:.1f} GiB",
            "System": m.get("os", "unknown"),
            "Software": ", ".join(
                [f"Python {m.get('python', '?')}", *(f"{k} {v}" for k, v in versions.items())]
            ),
        }
        if facts not in out:
            out.append(facts)
    return out
