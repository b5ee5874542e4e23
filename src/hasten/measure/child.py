"""The child's side of a measurement: one process, one session, commands in, replies out.

Started by `hasten.measure.process`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import MeasureError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.measure.wire import Server, peak_rss_mb, reset_peak_rss, serve
from hasten.workloads.workload import Session, Workload


def main() -> None:
    """Entry point: ``child REPLY_FD PARENT_PID THREADS CPU,CPU,...``."""
    serve(_Server(int(sys.argv[3])), int(sys.argv[1]), int(sys.argv[2]), sys.argv[4])


class _Server(Server):
    """Holds the session and answers one command at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.session: Session | None = None

    def do_open(self, workload: str, plan: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        kind = load_class(workload, Workload)
        built = plan_from_wire(plan)
        self._pin_torch()
        self.session = kind().open(built, options)
        self._pin_torch()
        load_peak = peak_rss_mb()
        return {"load_peak_mb": load_peak, "reset": reset_peak_rss()}

    def do_run(self) -> dict[str, Any]:
        run = self._opened().run()
        json.dumps(dict(run.detail), allow_nan=False)
        return {"units": run.units, "seconds": run.seconds, "detail": dict(run.detail)}

    def do_quality(self) -> float:
        return float(self._opened().quality())

    def do_facts(self) -> dict[str, Any]:
        facts = dict(self._opened().facts())
        json.dumps(facts, allow_nan=False)  # a fact that cannot be stored is refused here, where it is made
        return facts

    def do_close(self) -> None:
        self.close()

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def _opened(self) -> Session:
        if self.session is None:
            raise MeasureError("no session is open")
        return self.session

    def _pin_torch(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(self.threads)


def plan_to_wire(plan: Plan) -> dict[str, Any]:
    """``plan`` as JSON with the import path of every technique (its slug need not be in the catalogue)."""
    return {
        "model": plan.model,
        "dtype": plan.dtype,
        "engine": dict(plan.engine),
        "techniques": [[class_path(type(t)), t.model_dump(mode="json")] for t in plan.techniques],
    }


def plan_from_wire(data: Mapping[str, Any]) -> Plan:
    techniques = tuple(load_class(path, Technique)(**settings) for path, settings in data["techniques"])
    return Plan(data["model"], techniques, data["dtype"], data["engine"]).check()


def class_path(kind: type) -> str:
    """``module:Class``; `MeasureError` for a class that another process could not import."""
    path = f"{kind.__module__}:{kind.__qualname__}"
    found = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None)
    if kind.__module__ == "__main__" or found is not kind:
        raise MeasureError(
            f"{path} cannot be measured: each side runs in its own process, which must be able to import the "
            "class; define it at the top level of a module of its own"
        )
    return path


def load_class(path: str, base: type[Any]) -> type[Any]:
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise MeasureError(f"{path} is not a {base.__name__}")
    return found
