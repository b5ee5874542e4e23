"""`hasten demo`: the main job in a few minutes: a real answer, three techniques measured, a table and a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import common

if TYPE_CHECKING:
    from hasten.measure.comparison import Comparison

QUESTION = "In three sentences: why can a program be slow although the processor is hardly busy?"

# Small enough for a coffee break, large enough that the gain shows. `hasten bench SLUG` runs the full jobs.
SHOWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "hydragen",
        "shared-prefix",
        {"prefix_tokens": 512, "questions": 8, "tokens": 24, "quality_tokens": 16, "reference": False},
    ),
    ("adamas", "long-decode", {"context": 4096, "tokens": 48, "quality_tokens": 48, "reference": False}),
    ("gptq:samples=16", "decode", {"reference": False}),
)
PAIRS = 6


def demo(
    model: common.Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path(
        "report.html"
    ),
    pairs: Annotated[int, typer.Option("--pairs", min=6, help="Timed pairs of each comparison.")] = PAIRS,
    as_json: common.AsJson = False,
) -> None:
    """Answer a question, then measure three techniques on their jobs.

    A quantised weight format, a sparse attention policy and a shared-prefix attention kernel, each against the same
    engine without it, runs interleaved, quality beside speed. What must be calibrated once is kept for the next run.

    Examples:

      hasten demo

      hasten demo --model ./model.gguf --output demo.html --json
    """
    from rich.console import Console

    from hasten.catalog.loader import technique
    from hasten.core.errors import MeasureError
    from hasten.core.plan import parse_use
    from hasten.measure.report import render
    from hasten.measure.store import ResultStore, write_text

    if output.is_dir():
        raise MeasureError(f"{output} is a folder; --output takes the file to write")
    for use, *_ in SHOWN:
        parse_use(use, technique)  # whatever cannot run is refused now, not after minutes
    console = Console(stderr=as_json)
    talk(model, console)
    store = ResultStore()
    measured = []
    for use, workload, options in SHOWN:
        comparison = measure(use, workload, options, model, pairs)
        store.add(comparison)
        measured.append(comparison)
    if as_json:
        common.print_json([comparison.to_dict() for comparison in measured])
    else:
        console.print(table(measured))
    for reason in dict.fromkeys(reason for c in measured for reason in c.unpublishable):
        console.print(f"not to be published: {reason}", style="dim", markup=False, highlight=False)
    write_text(output, render(measured))
    console.out(f"Report: {output.resolve()}", highlight=False)


def talk(model: str | None, console: Any) -> None:
    """Stream one chat answer and say how fast it came."""
    from hasten.lm.request import SamplingParams

    params = SamplingParams(max_tokens=96, temperature=0)
    with common.open_llm(common.make_plan(model, None, None, None)) as llm:
        console.print(f"[bold]{QUESTION}[/bold]")
        began = time.perf_counter()
        stream = llm.chat([{"role": "user", "content": QUESTION}], params, stream=True)
        for delta in stream:
            console.out(delta.text, end="", highlight=False)
        done = stream.completion()
        first, total = done.timing.first_token, time.perf_counter() - began
        rate = (len(done.token_ids) - 1) / max(total - first, 1e-9)
        console.print(f"\n[dim]first token after {1000 * first:.0f} ms, then {rate:.0f} tokens/s[/dim]\n")


def measure(use: str, workload: str, options: dict[str, Any], model: str | None, pairs: int) -> Comparison:
    """One comparison on a shortened job; on a busy machine too, marked as not to be published."""
    from hasten import workloads
    from hasten.catalog.loader import technique
    from hasten.measure.comparison import compare
    from hasten.workloads.baselines import baselines

    against = baselines(workloads.get(workload), technique(use.partition(":")[0]), model)[0]
    return compare(
        workload, use=[use], against=against, model=model, pairs=pairs, options=options, allow_busy=True
    )


def table(measured: list[Comparison]) -> Any:
    """Ratio, interval, quality and memory of each comparison."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title="Measured on this machine, interleaved, quality beside speed")
    for name in ("job", "with", "against", "speed", "95% interval", "quality", "memory (MiB)"):
        out.add_column(name, overflow="fold")
    for c in measured:
        out.add_row(
            c.workload,
            escape(c.label("candidate")),
            escape(f"{c.label('baseline')} ({c.plans['baseline']['dtype']})"),
            f"[bold]{c.speedup.median:.2f}x[/bold]",
            f"{c.speedup.low:.2f} to {c.speedup.high:.2f}",
            escape(c.quality.text()),
            f"{c.memory.baseline_mb:.0f} → {c.memory.candidate_mb:.0f}",
        )
    return out
