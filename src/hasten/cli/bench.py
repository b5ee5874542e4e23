"""`hasten bench`: one system on its own workload, against its baselines."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli import common, measuring


def bench(
    slug: Annotated[str, typer.Argument(help="The system, as `hasten list` names it.")],
    json_file: measuring.JsonFile = None,
    pairs: measuring.Pairs = None,
    model: common.Model = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Setting of the technique, e.g. bits=3. Repeatable."),
    ] = None,
    options: measuring.Options = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            "-a",
            help="auto, bfloat16, float32, a plan file or techniques joined by +. Repeatable. "
            "[default: the system's own baselines]",
        ),
    ] = None,
    publish: measuring.Publish = None,
    threads: measuring.Threads = None,
    allow_busy: measuring.AllowBusy = False,
    timeout: measuring.Timeout = None,
    store: measuring.StoreFile = None,
) -> None:
    """Measure a system on the workload its record names: speed, quality and memory beside its baseline.

    Both sides run in processes of their own, pinned to the same cores, in turn; the result is the median of paired
    ratios with its 95% interval. A weight format is compared with dense bfloat16, float32 and the stored weights.

    Examples:

      hasten bench adamas

      hasten bench gptq --set bits=3 --against bfloat16 --json gptq.json

      hasten bench hydragen --option prefix_tokens=1024 --pairs 8

      hasten bench adamas --publish benchmarks/results
    """
    from hasten import workloads
    from hasten.catalog import loader
    from hasten.measure import bench as measure
    from hasten.measure.store import ResultStore

    record = loader.record(slug)
    measure.check_publishing(publish, allow_busy)
    plans = []
    if against:
        record.load()
        base = workloads.get(record.workload).baseline(model)
        plans = [measuring.plan_of(text, base) for text in against]
    results = ResultStore(store)
    found = []
    for comparison in measure.bench(
        slug,
        measuring.key_values(settings, "--set"),
        model=model,
        against=plans,
        pairs=pairs,
        options=measuring.key_values(options, "--option"),
        threads=threads,
        allow_busy=allow_busy,
        timeout=timeout,
    ):
        results.add(comparison)
        found.append(comparison)
    measuring.show(found, measure.record_of(found), json_file)
    measuring.publish(found, publish)
