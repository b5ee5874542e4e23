"""`Comparison`: two plans on one workload, speed and quality side by side; and `compare`, which measures one.

A `Comparison` always carries both the ratio and the quality of both sides, and `Comparison.headline` is the
one way to print a ratio, so that none appears without its quality.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from hasten import workloads
from hasten.catalog import loader
from hasten.core.errors import MeasureError
from hasten.core.plan import Plan, Use
from hasten.measure.environment import BusyMonitor, Busyness, machine, pinned_cpus
from hasten.measure.interleave import Pairs, measure_pairs, warm_up
from hasten.measure.process import SessionProcess
from hasten.measure.progress import Progress
from hasten.measure.statistics import Interval, Stopping
from hasten.workloads.workload import Workload

FORMAT = 1  # of `Comparison.to_dict`; raised when a field changes its meaning


@dataclass(frozen=True)
class Quality:
    """Figures of ``metric`` for both sides on the same input; ``better`` is ``higher`` or ``lower``."""

    metric: str
    baseline: FiniteFloat
    candidate: FiniteFloat
    better: Literal["higher", "lower"]
    unit: str = ""

    @property
    def change(self) -> float | None:
        """Relative change, positive = the candidate is better (0.01 = 1%). None for a baseline of zero."""
        if self.baseline == 0:
            return 0.0 if self.candidate == 0 else None
        change = (self.candidate - self.baseline) / abs(self.baseline)
        return change if self.better == "higher" or change == 0 else -change

    def text(self) -> str:
        change = (
            "" if self.change is None else f" ({self.change:+.2%} {'better' if self.change > 0 else 'worse'})"
        )
        if self.change == 0:
            change = " (equal)"
        return (
            f"{self.metric} {self.baseline:.4g} → {self.candidate:.4g}{self.unit and ' ' + self.unit}{change}"
        )


@dataclass(frozen=True)
class Memory:
    """Peak resident set of each side's own process in MiB, during the job (loading excluded)."""

    baseline_mb: FiniteFloat
    candidate_mb: FiniteFloat


@dataclass(frozen=True)
class Comparison:
    """One paired measurement. Everything that is printed, stored or published about speed is read from here.

    system: slugs of the candidate's techniques joined by ``+`` (``baseline`` if it has none). plans: both
    plans (`Plan.to_dict`) with their ``label``. runs: raw seconds and units of every timed run, in order.
    facts: each side's extra figures. loading_mb: peak RSS while loading. busy: who else used the CPUs
    before and during the runs. unpublishable: why the figure may not be published; empty if it may.
    """

    system: str
    workload: str
    plans: Mapping[str, Mapping[str, Any]]
    speedup: Interval
    quality: Quality
    memory: Memory
    claim: str
    target: str
    machine: Mapping[str, Any]
    commit: str | None
    model: str
    unit: str
    runs: Mapping[str, Any]
    created: str  # UTC, ISO 8601
    id: Annotated[str, Field(min_length=1)]
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loading_mb: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, Any] = field(default_factory=dict)
    unpublishable: tuple[str, ...] = ()
    format: int = FORMAT

    def headline(self) -> str:
        """Ratio, interval and quality in one line."""
        s = self.speedup
        return f"{s.median:.2f}x [{s.low:.2f}, {s.high:.2f}] · {self.quality.text()}"

    def label(self, side: str) -> str:
        return str(self.plans[side].get("label", side))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal object."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["speedup"] = self.speedup.to_dict()
        out["quality"] = vars(self.quality).copy()
        out["memory"] = vars(self.memory).copy()
        out["unpublishable"] = list(self.unpublishable)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Raises `MeasureError` for a record that is not a comparison or is of a newer format."""
        if not isinstance(data, Mapping):
            raise MeasureError(f"a comparison must be a JSON object, not {type(data).__name__}")
        if data.get("format", FORMAT) != FORMAT:
            raise MeasureError(
                f"comparison {data.get('id', '?')} has format {data['format']!r}; this hasten reads format {FORMAT}"
            )
        try:
            return _reader().validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MeasureError(
                f"comparison {data.get('id', '?')} is not well-formed: {where}: {first['msg']}"
            ) from None


@functools.cache
def _reader() -> TypeAdapter[Comparison]:
    return TypeAdapter(Comparison)


def compare(
    workload: str | Workload,
    candidate: Plan | None = None,
    *,
    use: Iterable[Use] = (),
    against: Plan | None = None,
    model: str | None = None,
    pairs: int | None = None,
    stopping: Stopping | None = None,
    warmup: int = 1,
    options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    allow_busy: bool = False,
    timeout: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure ``candidate`` (or the workload's baseline plan plus ``use``) against ``against`` on one workload.

    Each plan runs in its own process, pinned to the same CPUs with ``threads`` threads (default: one per
    physical core); runs alternate A B B A. ``against`` defaults to the workload's baseline plan. ``pairs``
    fixes the number of pairs; without it pairs are measured until ``stopping`` is content. ``options``
    shrink or grow the job (see the workload).

    Raises `UnknownNameError` / `PlanError` / `SettingError` before any work, `MeasureError` when the machine is
    busy (unless ``allow_busy``: then the record says so and may not be published) or a side fails; errors
    of a side's own (`ModelError`, `UnsupportedError`, ...) keep their class.
    """
    job = workloads.get(workload) if isinstance(workload, str) else workload
    base = job.baseline(model)
    if candidate is None:
        candidate = Plan.of(use, loader.technique, model=base.model, dtype=base.dtype, engine=base.engine)
    elif tuple(use):
        raise MeasureError("pass either a candidate plan or `use`, not both")
    plans = {"baseline": (against or base).check(), "candidate": candidate.check()}
    if pairs is not None and stopping is not None:
        raise MeasureError("pass either pairs or stopping, not both")
    stopping = stopping or (Stopping() if pairs is None else Stopping.fixed(pairs))
    if threads is not None and threads < 1:
        raise MeasureError(f"threads = {threads}: must be at least 1")
    if warmup < 1:
        raise MeasureError(f"warmup = {warmup}: at least one warm-up run is needed")

    cpus = pinned_cpus(threads)
    threads = threads or len(cpus)
    here = machine(threads, cpus)
    before = BusyMonitor().sample()
    if before.reasons and not allow_busy:
        raise MeasureError(
            "this machine is busy, so the figure would not be honest: " + "; ".join(before.reasons) + ". "
            "Stop them or wait, or pass --allow-busy (allow_busy=True) to measure all the same: the record is "
            "then marked as not to be published"
        )

    with ExitStack() as stack, Progress(f"{job.name}: {plans['candidate'].label()}", shown=progress) as shown:
        sides = {}
        for side, plan in plans.items():
            shown.step(f"load {side}")
            process = SessionProcess(f"{side} ({plan.label()})", threads=threads, cpus=cpus, timeout=timeout)
            sides[side] = stack.enter_context(process)
            process.open(job, plan, options or {})
        shown.step("warm up")
        warm_up(sides["baseline"], sides["candidate"], warmup)
        # Peaks are read here: a whole job has run, the quality input (another job) has not.
        peaks = {side: process.peak_mb() for side, process in sides.items()}
        figures = {}
        for side, process in sides.items():
            shown.step(f"quality of {side}")
            figures[side] = process.quality()
        quality = Quality(job.metric.name, **figures, better=job.metric.better, unit=job.metric.unit)
        shown.begin_pairs(stopping.max_pairs, quality.text())
        monitor = BusyMonitor()
        monitor.start()
        measured = measure_pairs(sides["baseline"], sides["candidate"], stopping, shown.pair)
        during = monitor.stop()
        facts = {}
        for side, process in sides.items():
            shown.step(f"facts of {side}")
            facts[side] = process.facts()
            process.close()

    system, claim, target = _identity(plans["candidate"])
    return Comparison(
        system=system,
        claim=claim,
        target=target,
        workload=job.name,
        plans={side: {"label": plan.label(), **plan.to_dict()} for side, plan in plans.items()},
        speedup=measured.interval(),
        quality=quality,
        memory=Memory(round(peaks["baseline"], 1), round(peaks["candidate"], 1)),
        machine=here.to_dict(),
        commit=here.commit,
        model=plans["candidate"].model,
        unit=job.unit,
        runs=_runs(measured),
        options=dict(options or {}),
        facts=facts,
        loading_mb={side: round(process.load_peak_mb, 1) for side, process in sides.items()},
        busy={"before": before.to_dict(), "during": during.to_dict()},
        unpublishable=_unpublishable(before, during, here.commit, here.dirty),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        id=uuid.uuid4().hex,
    )


def _identity(plan: Plan) -> tuple[str, str, str]:
    """(system, claim, target): the latter two for a plan of exactly one system of the catalogue."""
    slugs = [technique.slug for technique in plan.techniques]
    known = loader.records().get(slugs[0]) if len(slugs) == 1 else None
    return "+".join(slugs) or "baseline", known.claim if known else "", known.target if known else ""


def _runs(pairs: Pairs) -> dict[str, Any]:
    out: dict[str, Any] = {"first": list(pairs.first)}
    for side, runs in (("baseline", pairs.baseline), ("candidate", pairs.candidate)):
        out[side] = {
            "seconds": [run.seconds for run in runs],
            "units": [run.units for run in runs],
            "detail": [dict(run.detail) for run in runs],
        }
    return out


def _unpublishable(before: Busyness, during: Busyness, commit: str | None, dirty: bool) -> tuple[str, ...]:
    out = [f"before the runs, {reason}" for reason in before.reasons]
    out += [f"during the runs, {reason}" for reason in during.reasons]
    if commit is None:
        out.append("not measured from a git checkout: no commit says which code this was")
    elif dirty:
        out.append(f"the source tree differs from commit {commit[:12]}: commit first")
    return tuple(out)
