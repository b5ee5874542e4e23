"""`hasten compare`: any two plans on any workload."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from hasten.cli import common, measuring


def compare(
    workload: Annotated[
        str,
        typer.Argument(
            help="decode, prefill, long-prefill, long-decode, batch-decode, shared-prefix or edit."
        ),
    ],
    use: common.Use = None,
    plan: common.PlanFile = None,
    model: common.Model = None,
    dtype: common.Dtype = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            "-a",
            help="auto, bfloat16, float32, a plan file or techniques joined by +. [default: the workload's baseline]",
        ),
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts", help="Then against each technique of the plan alone: what does the other add?"
        ),
    ] = False,
    json_file: measuring.JsonFile = None,
    publish: measuring.Publish = None,
    pairs: measuring.Pairs = None,
    options: measuring.Options = None,
    threads: measuring.Threads = None,
    allow_busy: measuring.AllowBusy = False,
    timeout: measuring.Timeout = None,
    store: measuring.StoreFile = None,
) -> None:
    """Compare two plans on one workload: speed, quality and memory side by side.

    Examples:

      hasten compare long-decode --use adamas:budget=128

      hasten compare decode --use gptq:bits=4 --against bfloat16 --json out.json

      hasten compare shared-prefix --use gptq --use hydragen --against gptq --option questions=8

      hasten compare prefill --plan mine.toml --against theirs.toml --pairs 12

      hasten compare long-decode --use adamas --use sleb --parts --publish benchmarks/results
    """
    from hasten import workloads
    from hasten.core.errors import PlanError
    from hasten.measure import bench
    from hasten.measure.comparison import compare as measure
    from hasten.measure.store import ResultStore

    bench.check_publishing(publish, allow_busy)
    job = workloads.get(workload)
    candidate = common.make_plan(model, use, plan, dtype)
    if parts and len(candidate.techniques) < 2:
        raise PlanError(
            "--parts compares a plan with each of its techniques alone; name at least two with --use"
        )
    base = job.baseline(candidate.model)
    plans = [measuring.plan_of(against, base) if against else base]
    if parts:
        plans += [replace(candidate, techniques=(technique,)) for technique in candidate.techniques]
    results = ResultStore(store)
    found = []
    for other in plans:
        comparison = measure(
            job,
            candidate,
            against=other,
            pairs=pairs,
            options=measuring.key_values(options, "--option"),
            threads=threads,
            allow_busy=allow_busy,
            timeout=timeout,
        )
        results.add(comparison)
        found.append(comparison)
    measuring.show(found, bench.record_of(found) if parts else found[0].to_dict(), json_file)
    measuring.publish(found, publish)
