"""`Workload`: a real end-to-end job with real input, a baseline plan, a quality metric and a budget.

The measurer (`hasten.measure`) opens one *session* per plan, each in its own process, and interleaves
their runs. A workload knows nothing of timing or statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.core.plan import Plan


@dataclass(frozen=True)
class Metric:
    """A quality figure: its name, unit and which direction is better."""

    name: str
    better: Literal["higher", "lower"]
    unit: str = ""


@dataclass(frozen=True)
class Run:
    """One timed run of a session: the job's work in ``units`` and the seconds it took."""

    units: float
    seconds: float
    detail: Mapping[str, float] = field(default_factory=dict)


class Session(ABC):
    """A plan loaded and ready to run the job again and again. Used as a context manager."""

    @abstractmethod
    def run(self) -> Run:
        """Do the whole job once and say how long its measured part took (monotonic clock)."""

    @abstractmethod
    def quality(self) -> float:
        """The workload's metric on its quality input (not timed)."""

    def facts(self) -> Mapping[str, Any]:
        """Extra figures for the record: weight bytes, KV bytes, acceptance length, ..."""
        return {}

    def close(self) -> None:
        """Free what the session holds."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Workload(ABC):
    """A job. Subclasses are registered by name in `hasten.workloads`."""

    name: str
    title: str
    unit: str  # what `Run.units` counts, e.g. "tokens"
    metric: Metric

    @abstractmethod
    def baseline(self, model: str | None = None) -> Plan:
        """The strongest straightforward plan for this job."""

    @abstractmethod
    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        """Load ``plan`` and the input. ``options`` shrink or grow the job (documented per workload)."""
