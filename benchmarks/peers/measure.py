"""Running jobs on all engines in turn: every engine's process lives through the job, one works at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.peers.catalogue import OURS, REFERENCE, EngineSpec
from benchmarks.peers.engines.engine import Limits
from benchmarks.peers.jobs import Job, Run
from benchmarks.peers.progress import Progress
from hasten.core.errors import HastenError, MeasureError, NotBuiltError, UnsupportedError
from hasten.lm.request import Score
from hasten.measure.environment import BusyMonitor
from hasten.measure.process import ChildProcess
from hasten.workloads.language import agreement, perplexity

State = Literal["ok", "cannot", "missing", "failed"]
"""cannot: the engine says so, with its reason. missing: not installed. failed: it died, hung or answered garbage."""


@dataclass(frozen=True)
class Setup:
    """What is the same for every run. files: model paths by kind; problems: why a kind is missing."""

    home: Path
    files: Mapping[str, str]
    threads: int
    cpus: tuple[int, ...] = ()
    timeout: float = 600.0
    use: tuple[str, ...] = ()
    problems: Mapping[str, HastenError] = field(default_factory=dict)

    def open(self, spec: EngineSpec, stack: ExitStack) -> ChildProcess:
        """Its process, running. `NotBuiltError` or the reason why its weights could not be made."""
        if spec.reads in self.problems:
            raise self.problems[spec.reads]
        process = spec.process(self.home, threads=self.threads, cpus=self.cpus, timeout=self.timeout)
        try:
            return stack.enter_context(process)
        except OSError as error:
            raise MeasureError(f"{process.command[0]} cannot be started: {error.strerror or error}") from None

    def load(self, spec: EngineSpec, process: ChildProcess, context: int, job: Job | None = None) -> float:
        """Load within what ``job`` needs; the peak RSS of that in MiB."""
        limits = Limits(
            files=self.files,
            threads=self.threads,
            context=context,
            batch=job.prompts if job else 1,
            prefix_cache=bool(job and job.shared and spec.prefix_cache != "never"),
            use=self.use if spec.name == OURS.name else (),
        )
        return float(process.ask("load", engine=spec.entry, limits=asdict(limits)))


@dataclass
class Lane:
    """One engine's runs of one job, or its ``state`` and the ``reason`` why there are none."""

    spec: EngineSpec
    runs: list[Run] = field(default_factory=list)
    state: State = "ok"
    reason: str = ""
    process: ChildProcess | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def drop(self, error: HastenError) -> None:
        self.state, self.reason = judge(error, self.spec)
        self.runs.clear()
        self.process = None


@dataclass(frozen=True)
class Quality:
    """How far greedy answers follow the float32 reference (leading tokens equal, as a share), and perplexity."""

    agreement: float | None
    perplexity: float | None
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """All lanes of a job, and who else used the CPUs."""

    job: Job
    lanes: list[Lane]
    bandwidth: list[float]  # bytes a second, one figure for each round; empty if nothing is bound by it
    busy: dict[str, Any]


def judge(error: HastenError, spec: EngineSpec) -> tuple[State, str]:
    """What an engine's error makes of its row."""
    text = str(error).strip().removeprefix(f"{spec.name}: ")
    if isinstance(error, NotBuiltError):
        return "missing", text
    return ("cannot", text) if isinstance(error, UnsupportedError) else ("failed", text)


def run_job(
    job: Job,
    specs: Iterable[EngineSpec],
    inputs: Sequence[list[list[int]]],
    setup: Setup,
    progress: Progress,
) -> Measured:
    """Run ``job`` on every engine once for each of ``inputs``, the first one untimed; the order turns every round.

    An engine that fails leaves the others alone. Only its own lane says so.
    """
    lanes = [
        Lane(spec)
        for spec in specs
        if spec.prefix_cache != "only shared" or job.shared  # it would be the same engine twice
    ]
    context = max(len(prompt) for prompts in inputs for prompt in prompts) + job.tokens
    bandwidth: list[float] = []
    monitor = BusyMonitor()
    with ExitStack() as stack:
        if not job.fresh:
            for lane in lanes:
                progress.step(f"{job.name}: load {lane.spec.name}")
                _guard(lane, lambda lane=lane: _open(lane, job, context, setup, stack))
        for number, prompts in enumerate(inputs):
            if number == 1:
                monitor.start()
            for lane in lanes if number % 2 == 0 else reversed(lanes):
                if lane.state != "ok":
                    continue
                progress.step(f"{job.name}: {lane.spec.name}, run {number} of {len(inputs) - 1}")
                run = _guard(
                    lane, lambda lane=lane, prompts=prompts: _run(lane, job, prompts, context, setup)
                )
                if number and run is not None:
                    lane.runs.append(run)
                progress.advance()
            bound = lanes[0].process
            if number and bound is not None and any(figure.bound for figure in job.figures):
                bandwidth.append(float(bound.ask("bandwidth")))
        busy = monitor.stop().to_dict()
    return Measured(job, lanes, bandwidth, busy)


def _guard(lane: Lane, work: Any) -> Any:
    try:
        return work()
    except HastenError as error:
        if lane.process is not None:
            lane.process.__exit__(None, None, None)
        lane.drop(error)
        return None


def _open(lane: Lane, job: Job, context: int, setup: Setup, stack: ExitStack) -> None:
    lane.process = setup.open(lane.spec, stack)
    setup.load(lane.spec, lane.process, context, job)
    lane.facts = dict(lane.process.ask("facts"))


def _run(lane: Lane, job: Job, prompts: list[list[int]], context: int, setup: Setup) -> Run:
    if not job.fresh:
        assert lane.process is not None
        return _checked(lane, job, _generate(lane.process, job, prompts))
    began = time.perf_counter()
    with ExitStack() as stack:
        process = setup.open(lane.spec, stack)
        load_peak = setup.load(lane.spec, process, context, job)
        loaded = time.perf_counter() - began
        run = _checked(lane, job, _generate(process, job, prompts))
        peak = float(process.ask("peak"))
        lane.facts = lane.facts or dict(process.ask("facts"))
    return {**run, "start": loaded + run["first"], "peak_mb": peak, "load_peak_mb": load_peak}


def _generate(process: ChildProcess, job: Job, prompts: list[list[int]]) -> dict[str, Any]:
    return dict(process.ask("generate", prompts=prompts, tokens=job.tokens, shared=job.shared))


def _checked(lane: Lane, job: Job, run: dict[str, Any]) -> Run:
    """Refuse an answer that is none: `MeasureError` naming what is wrong."""
    tokens = run.get("tokens")
    if not isinstance(tokens, list) or [len(t) for t in tokens] != [job.tokens] * job.prompts:
        raise MeasureError(
            f"{lane.spec.name}: {job.name} was not answered with {job.prompts} x {job.tokens} tokens"
        )
    for name in ("first", "total"):
        if not (isinstance(run.get(name), float) and 0 < run[name] < float("inf")):
            raise MeasureError(f"{lane.spec.name}: {job.name} took {run.get(name)!r} s ({name})")
    if not (isinstance(run.get("late"), int) and run["late"] > 0 and run["total"] > run["first"]):
        raise MeasureError(f"{lane.spec.name}: {job.name}: no token came after the first ones")
    return run


@dataclass(frozen=True)
class QualityInput:
    """Prompts to answer with ``tokens`` tokens each, one at a time, and texts scored from index ``context`` on."""

    prompts: list[list[int]]
    tokens: int
    texts: list[list[int]]
    context: int


def qualities(
    specs: Iterable[EngineSpec], given: QualityInput, setup: Setup, progress: Progress
) -> dict[str, Quality]:
    """Quality by engine name, the reference's too. An engine that fails has none, with the reason."""
    out: dict[str, Quality] = {}
    reference: list[list[int]] = []
    for spec in (REFERENCE, *specs):
        if spec.quality in out:
            continue
        progress.step(f"quality of {spec.name}")
        try:
            answers, found = _quality_of(spec, given, setup)
        except HastenError as error:
            if spec is REFERENCE:
                raise
            out[spec.quality] = Quality(None, None, judge(error, spec)[1])
            continue
        finally:
            progress.advance()
        reference = reference or answers
        _, leading = agreement(answers, reference)
        out[spec.quality] = Quality(round(leading / given.tokens, 4), *found)
    return out


def _quality_of(
    spec: EngineSpec, given: QualityInput, setup: Setup
) -> tuple[list[list[int]], tuple[float | None, str]]:
    longest = max(*(len(p) + given.tokens for p in given.prompts), *(len(t) + 1 for t in given.texts))
    with ExitStack() as stack:
        process = setup.open(spec, stack)
        setup.load(spec, process, longest)
        answers = [
            process.ask("generate", prompts=[prompt], tokens=given.tokens)["tokens"][0]
            for prompt in given.prompts
        ]
        try:
            scored = process.ask("score", texts=given.texts, context=given.context)
        except UnsupportedError as error:
            return answers, (None, judge(error, spec)[1])
    wanted = [len(text) - given.context for text in given.texts]
    if [len(logprobs) for logprobs in scored] != wanted:
        raise MeasureError(f"{spec.name}: scored other tokens than it was given")
    return answers, (perplexity([Score((), logprobs) for logprobs in scored]), "")
