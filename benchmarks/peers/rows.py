"""One row for each case and engine: the figure, how hasten compares, the quality beside it; and the record of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks.peers.catalogue import OURS
from benchmarks.peers.jobs import Figure
from benchmarks.peers.measure import Lane, Measured, Quality, State
from hasten.measure.statistics import MIN_PAIRS, Interval, median_interval
from hasten.workloads.language import agreement

BOUND = "memory bound"
_NO_QUALITY = Quality(None, None, "not measured")


@dataclass(frozen=True)
class Row:
    """value: the median of ``values``. ratio: how many times better hasten is (faster, or smaller), pair by pair; None
    for hasten itself, where there is no figure, and below six pairs. alike: the share of new tokens that lead as
    hasten's did in the same runs."""

    case: str
    label: str
    engine: str
    unit: str
    better: str
    value: float | None
    ratio: Interval | None
    pairs: int
    values: tuple[float, ...]
    quality: Quality
    alike: float | None
    version: str
    settings: str
    state: State
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio.to_dict() if self.ratio else None}


def rows(measured: Measured, qualities: Mapping[str, Quality]) -> list[Row]:
    """The rows of one job: figure by figure, engine by engine, then the bound if there is one."""
    ours = measured.lanes[0]
    out = []
    for figure in measured.job.figures:
        theirs = {lane.spec.name: [figure.of(run) for run in lane.runs] for lane in measured.lanes}
        for lane in measured.lanes:
            values = theirs[lane.spec.name]
            own = lane is ours
            out.append(
                Row(
                    **_figure(figure, values),
                    engine=lane.spec.name,
                    ratio=None if own else _ratio(figure, theirs[OURS.name], values),
                    quality=qualities.get(lane.spec.quality, _NO_QUALITY),
                    alike=None if own else _alike(ours, lane),
                    version=str(lane.facts.get("version", "")),
                    settings=str(lane.facts.get("settings", "")),
                    state=lane.state,
                    reason=lane.reason,
                )
            )
        if figure.bound and measured.bandwidth and ours.runs:
            out.append(_bound_row(figure, measured, theirs[OURS.name]))
    return out


def _figure(figure: Figure, values: Sequence[float]) -> dict[str, Any]:
    return {
        "case": figure.case,
        "label": figure.label,
        "unit": figure.unit,
        "better": figure.better,
        "value": statistics.median(values) if values else None,
        "values": tuple(values),
        "pairs": len(values),
    }


def _ratio(figure: Figure, ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    if min(len(ours), len(theirs)) < MIN_PAIRS:
        return None
    higher = figure.better == "higher"
    return median_interval([o / t if higher else t / o for o, t in zip(ours, theirs, strict=True)])


def _alike(ours: Lane, lane: Lane) -> float | None:
    if not (ours.runs and lane.runs):
        return None
    shares = []
    for mine, theirs in zip(ours.runs, lane.runs, strict=False):
        _, leading = agreement(theirs["tokens"], mine["tokens"])
        shares.append(leading / len(mine["tokens"][0]))
    return round(statistics.mean(shares), 4)


def _bound_row(figure: Figure, measured: Measured, ours: Sequence[float]) -> Row:
    """Tokens a second if reading a token's weights and cache at the memory's measured speed were all."""
    facts, job = measured.lanes[0].facts, measured.job
    context = job.length + job.tokens / 2
    size = facts["weight_bytes_per_token"] + facts["kv_bytes_per_token"] * context
    values = [bandwidth / size for bandwidth in measured.bandwidth]
    speed = statistics.median(measured.bandwidth) / 1e9
    return Row(
        **_figure(figure, values),
        engine=BOUND,
        ratio=_ratio(figure, ours, values),
        quality=Quality(None, None, "not an engine"),
        alike=None,
        version="",
        settings=f"{size / 1e6:.1f} MB a token at {speed:.1f} GB/s",
        state="ok",
        reason="",
    )


def _cells(row: Row) -> tuple[str, ...]:
    quality = row.quality
    value = row.reason.splitlines()[0] if row.value is None else f"{row.value:,.4g} {row.unit}"
    ratio = f"{row.ratio.median:.2f}x [{row.ratio.low:.2f}, {row.ratio.high:.2f}]" if row.ratio else "–"
    agreed = "–" if quality.agreement is None else f"{quality.agreement:.1%}"
    perplexity = "–" if quality.perplexity is None else f"{quality.perplexity:.3f}"
    return row.label, row.engine, value, ratio, agreed, perplexity


HEADINGS = ("case", "engine", "figure", "hasten is", "greedy agreement", "perplexity")


def table(found: Iterable[Row], title: str) -> Table:
    """For a terminal. Reasons are shown where a figure would be."""
    out = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        out.add_column(heading, overflow="fold", justify="right" if heading == HEADINGS[3] else "left")
    before = None
    for row in found:
        if before not in (None, row.label):
            out.add_section()
        first, *rest = _cells(row)
        out.add_row(
            "" if row.label == before else first, *rest, style="bold" if row.engine == OURS.name else ""
        )
        before = row.label
    return out


def markdown(record: Mapping[str, Any], found: Sequence[Row]) -> str:
    """The same table for a file, with what it was measured on."""
    machine = record["machine"]
    lines = [
        f"# Beside other engines: {record['model']}",
        "",
        "Written by `python -m benchmarks.peers --publish`; do not edit. Median of runs in turn; `hasten is` is the "
        "median of paired ratios (above 1: hasten is faster, or smaller) with its 95% interval. Agreement: the share "
        "of greedy tokens that lead as the float32 reference's do.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in found]
    lines += ["", "Engines:", ""]
    seen = {(row.engine, row.version, row.settings) for row in found if row.version}
    lines += [f"- {engine}: {version}; {settings}" for engine, version, settings in sorted(seen)]
    reference = record["quality"].get("reference", {}).get("perplexity")
    if reference is not None:
        lines += [f"- reference (hasten, float32): perplexity {reference:.3f}"]
    lines += [
        "",
        f"Measured on: {machine['cpu']}, {machine['threads']} threads, commit {str(record['commit'])[:10]}, "
        f"{record['created'][:10]}.",
        "",
    ]
    return "\n".join(lines)
