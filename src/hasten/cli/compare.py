"""`hasten compare`: any two plans on any workload."""

from __future__ import annotations

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
    json_file: measuring.JsonFile = None,
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
    """
    from hasten import workloads
    from hasten.measure.comparison import compare as measure
    from hasten.measure.store import ResultStore

    job = workloads.get(workload)
    candidate = common.make_plan(model, use, plan, dtype)
    base = job.baseline(candidate.model)
    comparison = measure(
        job,
        candidate,
        against=measuring.plan_of(against, base) if against else base,
        pairs=pairs,
        options=measuring.key_values(options, "--option"),
        threads=threads,
        allow_busy=allow_busy,
        timeout=timeout,
    )
    ResultStore(store).add(comparison)
    measuring.show([comparison], comparison.to_dict(), json_file)
