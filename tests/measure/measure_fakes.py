"""Workloads and techniques for tests of the measurer: deterministic CPU work, no torch, no model, no sleep."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from hasten.core.errors import ModelError, UnknownNameError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.workloads.workload import Metric, Run, Session, Workload

SLEEP = "601.25"  # seconds; odd, so that a test can find this very sleeper


class Quicker(Technique):
    """Divides the work of `HashJob` by ``factor`` and moves its quality to ``quality``."""

    slug: ClassVar[str] = "quicker"
    slots: ClassVar[tuple[str, ...]] = ("layer_hook",)
    lossless: ClassVar[bool] = False

    factor: float = 2.0
    quality: float = 10.5
    note: str = ""


class Neater(Quicker):
    """A second one, which the job takes no notice of beside the first."""

    slug: ClassVar[str] = "neater"


class HashSession(Session):
    def __init__(self, plan: Plan, options: Mapping[str, Any]) -> None:
        self.technique = next(iter(plan.techniques), None)
        self.options = options
        self.order = 0
        self._fail("open")
        held = options.get("load_mb", 0)
        del held

    def run(self) -> Run:
        self._fail("run")
        print('{"ok": "what a library prints must not be taken for an answer"}')
        if "log" in self.options:
            with open(self.options["log"], "a") as stream:
                stream.write(f"{'candidate' if self.technique else 'baseline'}\n")
        ballast = bytearray(self.options.get("run_mb", 0) * 2**20) if self.technique else b""
        for at in range(0, len(ballast), 4096):
            ballast[at] = 1
        rounds = int(self.options.get("rounds", 20_000) / getattr(self.technique, "factor", 1.0))
        began = time.perf_counter()
        digest = b"x"
        for _ in range(rounds):
            digest = hashlib.sha256(digest).digest()
        return Run(units=100.0, seconds=time.perf_counter() - began, detail={"rounds": float(rounds)})

    def quality(self) -> float:
        self._fail("quality")
        if self.technique and self.options.get("nan"):
            return float("nan")
        return getattr(self.technique, "quality", 10.0)

    def facts(self) -> Mapping[str, Any]:
        return {
            "threads": os.environ["OMP_NUM_THREADS"],
            "affinity": sorted(os.sched_getaffinity(0)),
            "pid": os.getpid(),
        }

    def _fail(self, when: str) -> None:
        how = self.options.get(f"{when}_failure") if self.technique else None
        if how == "raise":
            raise ValueError("the job went wrong")
        if how == "model":
            raise ModelError("no tokenizer.json in the folder")
        if how == "name":
            raise UnknownNameError("option", "tokns", ["tokens"])
        if how == "exit":
            print("last words é", file=sys.stderr)
            sys.stderr.flush()
            os._exit(7)
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hang":
            if "sleeper" in self.options:
                subprocess.Popen(["sleep", SLEEP])
            if "hung" in self.options:
                with open(self.options["hung"], "w") as stream:
                    stream.write(f"{os.getpid()}")
            time.sleep(600)


class HashJob(Workload):
    name = "hash"
    title = "hash a chain"
    unit = "rounds"
    metric = Metric("badness", "lower", "points")

    def baseline(self, model: str | None = None) -> Plan:
        return Plan(model=model or "none")

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return HashSession(plan, options or {})
