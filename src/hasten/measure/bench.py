"""The published measurement of a catalogued system: its record's workload, against each of its baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten import workloads
from hasten.catalog import loader
from hasten.core.errors import MeasureError, NotBuiltError
from hasten.core.plan import Plan
from hasten.measure.comparison import Comparison, compare
from hasten.measure.environment import source_state
from hasten.measure.store import write_json
from hasten.workloads.baselines import baselines, measured_base


def bench(
    slug: str,
    settings: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    against: Sequence[Plan] = (),
    **how: Any,
) -> Iterator[Comparison]:
    """Compare a plan that uses ``slug`` with its baselines (`hasten.workloads.baselines`), the headline's first.

    ``against`` replaces the baselines; ``how`` goes to `hasten.measure.comparison.compare`. Every plan is
    checked before the first run. Raises `UnknownNameError`, `NotBuiltError`, `SettingError` and what `compare` raises.
    """
    record = loader.record(slug)
    technique = record.load()
    if record.workload not in workloads.names():
        raise NotBuiltError(
            f"{slug} is measured on workload {record.workload!r}, which does not exist yet; "
            f"`hasten compare WORKLOAD --use {slug}` runs it on another: " + ", ".join(workloads.names())
        )
    job = workloads.get(record.workload)
    base = measured_base(job, technique, model)
    candidate = replace(base, techniques=(*base.techniques, technique(**(settings or {})))).check()
    plans = tuple(against) or baselines(job, technique, model)

    def measure() -> Iterator[Comparison]:
        for plan in plans:
            yield compare(job, candidate, against=plan, **how)

    return measure()


def publishable_source() -> None:
    """Raise `MeasureError` unless this code is exactly a commit: cheaper to learn before measuring."""
    commit, dirty = source_state()
    if commit is None or dirty:
        raise MeasureError(
            "only a figure of committed code can be published: "
            + ("src/ or native/ differ from the commit; commit first" if dirty else "this is no git checkout")
        )


def check_publishing(folder: Path | None, allow_busy: bool) -> None:
    """Before measuring for publication in ``folder`` (None: nothing to publish). Raises `MeasureError`."""
    if folder is None:
        return
    if allow_busy:
        raise MeasureError("--publish and --allow-busy exclude each other: only quiet figures are published")
    publishable_source()


def record_of(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The JSON of one bench: the headline's comparison, the further ones under ``others``."""
    first, *rest = comparisons
    return {**first.to_dict(), "others": [comparison.to_dict() for comparison in rest]}


def publish(comparisons: Sequence[Comparison], folder: Path) -> Path:
    """Write ``<folder>/<system>.json``. `MeasureError` naming every reason against publishing, if there is one."""
    reasons = [
        f"{c.system} against {c.label('baseline')}: {reason}"
        for c in comparisons
        for reason in c.unpublishable
    ]
    if reasons:
        raise MeasureError("not published: " + "; ".join(reasons))
    path = folder / f"{comparisons[0].system}.json"
    write_json(path, record_of(comparisons))
    return path
