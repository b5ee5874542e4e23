"""The child's side of a measurement: one process, one session, commands in, replies out.

Started by `hasten.measure.process`. Commands are JSON lines on standard input, replies JSON lines on a
pipe of their own, so that nothing a library prints can be mistaken for a reply.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import HastenError, MeasureError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.workloads.workload import Session, Workload

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point: ``child REPLY_FD PARENT_PID THREADS CPU,CPU,...``."""
    reply_fd, parent, threads = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cpus = [int(cpu) for cpu in sys.argv[4].split(",") if cpu]
    _die_with(parent)
    os.set_inheritable(reply_fd, False)  # or a grandchild could keep the pipe open after our death
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    server = _Server(threads)
    with os.fdopen(reply_fd, "w", buffering=1) as out:
        for line in sys.stdin:
            out.write(json.dumps(server.answer(json.loads(line))) + "\n")
    server.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


class _Server:
    """Holds the session and answers one command at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.session: Session | None = None

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"ok": getattr(self, "do_" + command["do"])(**command.get("with", {}))}
        except HastenError as error:
            return {"error": str(error), "class": type(error).__name__}
        except Exception as error:  # the parent turns it into a MeasureError that shows the traceback
            text = "".join(traceback.format_exception(error)).strip()
            return {"error": f"{type(error).__name__}: {error}", "traceback": text}

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

    def do_peak(self) -> float:
        return peak_rss_mb()

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


def peak_rss_mb() -> float:
    """Highest resident set of this process in MiB since its start or the last `reset_peak_rss`."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> bool:
    """Start a new peak at the present resident set. False where the kernel cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


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
