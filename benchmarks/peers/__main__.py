"""hasten beside other engines on the same weights, prompts and threads: `python -m benchmarks.peers`.

Runs go in turn over all engines (A B C C B A ...), each in a process of its own environment (`make peers`). One row for
each case and engine: the figure, how many times better hasten is with its 95% interval, and quality.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peers import catalogue, rows
from benchmarks.peers.files import ModelFiles
from benchmarks.peers.jobs import CASES, Prompts, Sizes, jobs
from benchmarks.peers.measure import Measured, Quality, QualityInput, Setup, qualities, run_job
from benchmarks.peers.progress import Progress
from hasten.core.errors import HastenError, MeasureError
from hasten.measure.bench import publishable_source
from hasten.measure.environment import BusyMonitor, Machine, machine, pinned_cpus
from hasten.measure.statistics import MIN_PAIRS
from hasten.measure.store import write_json, write_text

FORMAT = 1


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=names, default=list(CASES), help="of " + ",".join(CASES))
    parser.add_argument(
        "--engines", type=names, help="of " + ",".join(catalogue.ENGINES) + "; all by default"
    )
    parser.add_argument("--model", help="a known name, a folder or a .gguf file")
    parser.add_argument("--pairs", type=int, default=8, help="timed runs of each engine; below 6 no interval")
    parser.add_argument("--threads", type=int, help="of every engine; by default one for each core")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="new tokens of each prompt")
    parser.add_argument("--use", type=names, default=[], help="techniques in hasten's plan, as slugs")
    parser.add_argument(
        "--peers", type=Path, default=catalogue.HOME, help="where `make peers` installed them"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="write record and table there, if quiet")
    parser.add_argument("--allow-busy", action="store_true", help="measure though others use the CPUs")
    return parser


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Exit code: 0, or 1 when an engine failed (its rows say how). sizes: of the cases, for tests."""
    chosen = _parser().parse_args(arguments)
    for name, least in (("pairs", 1), ("tokens", 2), ("timeout", 0.001), ("threads", 1)):
        value = getattr(chosen, name)
        if value is not None and not value >= least:
            raise MeasureError(f"--{name} {value}: must be at least {least}")
    if chosen.publish:
        publishable_source()
        if chosen.pairs < MIN_PAIRS:
            raise MeasureError(f"--pairs {chosen.pairs}: a published figure needs at least {MIN_PAIRS}")
    specs = catalogue.engines(chosen.engines)
    sizes = sizes or Sizes(tokens=chosen.tokens)
    wanted = jobs(chosen.cases, sizes)
    cpus = pinned_cpus(chosen.threads)
    threads = chosen.threads or len(cpus)
    here = machine(threads, cpus)
    before = BusyMonitor().sample()
    if before.reasons and not chosen.allow_busy:
        raise MeasureError(
            "this machine is busy, so the figures would not be honest: " + "; ".join(before.reasons) + ". "
            "Stop them or wait, or pass --allow-busy: the record is then marked as not to be published"
        )
    runs = chosen.pairs + 1  # one to warm up
    work = sum(len([s for s in specs if s.prefix_cache != "only shared" or j.shared]) for j in wanted) * runs
    with Progress(work + len(specs) + 1) as progress:
        files = ModelFiles(chosen.model, chosen.peers)
        files.prepare(specs, progress.step)
        setup = Setup(
            home=chosen.peers,
            files=files.paths,
            threads=threads,
            cpus=cpus,
            timeout=chosen.timeout,
            use=tuple(chosen.use),
            problems=files.problems,
        )
        progress.step("prompts")
        prompts = Prompts(files.checkpoint.tokenizer())
        inputs = [prompts.of(job, runs) for job in wanted]
        quality = qualities(specs, _quality_input(prompts, sizes), setup, progress)
        measured = [
            run_job(job, specs, given, setup, progress) for job, given in zip(wanted, inputs, strict=True)
        ]
    found = [row for one in measured for row in rows.rows(one, quality)]
    found.sort(key=lambda row: CASES.index(row.case))  # stable: a job may serve two cases
    record = _record(chosen, here, measured, quality, found, before.reasons)
    console = Console()
    console.width = max(console.width, 120)
    console.print(rows.table(found, f"{record['model']}, {threads} threads, {chosen.pairs} pairs"))
    for row in found:
        if row.reason:
            print(f"{row.label}, {row.engine}: {row.reason}", file=sys.stderr)
    if chosen.json:
        write_json(chosen.json, record)
    if chosen.publish:
        _publish(chosen.publish, record, found)
    return 1 if any(row.state == "failed" for row in found) else 0


def _quality_input(prompts: Prompts, sizes: Sizes) -> QualityInput:
    """Prompts as long as the shortest of case decode, and texts of four times that, of which the rest is scored."""
    length = min(sizes.decode)
    return QualityInput(
        prompts=prompts.text.windows(length, sizes.quality, skip=64),
        tokens=sizes.tokens,
        texts=prompts.text.windows(length * 4, sizes.quality),
        context=length,
    )


def _record(
    chosen: argparse.Namespace,
    here: Machine,
    measured: Sequence[Measured],
    quality: dict[str, Quality],
    found: Sequence[rows.Row],
    busy_before: Sequence[str],
) -> dict[str, Any]:
    reasons = [f"before the runs, {reason}" for reason in busy_before]
    for one in measured:
        reasons += [f"{one.job.name}: {reason}" for reason in one.busy["reasons"]]
    reasons += [
        f"{row.label}, {row.engine}: {row.reason}" for row in found if row.state in ("failed", "missing")
    ]
    if here.commit is None or here.dirty:
        reasons.append("the source tree is not exactly a commit")
    return {
        "kind": "peers",
        "format": FORMAT,
        "model": Path(chosen.model).name if chosen.model else _default_model(),
        "pairs": chosen.pairs,
        "use": chosen.use,
        "machine": here.to_dict(),
        "commit": here.commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "quality": {name: asdict(one) for name, one in quality.items()},
        "rows": [row.to_dict() for row in found],
        "jobs": {
            one.job.name: {
                "busy": one.busy,
                "bandwidth": one.bandwidth,
                "runs": {
                    lane.spec.name: [{k: v for k, v in run.items() if k != "tokens"} for run in lane.runs]
                    for lane in one.lanes
                },
            }
            for one in measured
        },
        "unpublishable": reasons,
    }


def _default_model() -> str:
    from hasten.models.known import DEFAULT_MODEL

    return DEFAULT_MODEL


def _publish(folder: Path, record: dict[str, Any], found: Sequence[rows.Row]) -> None:
    if record["unpublishable"]:
        raise MeasureError("not published: " + "; ".join(record["unpublishable"]))
    name = "peers-" + re.sub(r"[^A-Za-z0-9.-]+", "-", record["model"].removesuffix(".gguf"))
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.md", rows.markdown(record, found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HastenError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
