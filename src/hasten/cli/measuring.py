"""What `bench` and `compare` share: options, parsing, the table. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import common

if TYPE_CHECKING:
    from hasten.core.plan import Plan
    from hasten.measure.comparison import Comparison

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file; - is standard output.")
]
Publish = Annotated[
    Path | None,
    typer.Option(
        "--publish",
        help="Folder to write the result to, named for the plan; refused on a busy machine or changed code.",
    ),
]
Pairs = Annotated[
    int | None,
    typer.Option(
        "--pairs", help="Number of timed pairs. [default: until the interval is narrow, at most 25]"
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Option of the job, e.g. tokens=32. Repeatable."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of each side. [default: one per physical core]")
]
AllowBusy = Annotated[
    bool, typer.Option("--allow-busy", help="Measure on a busy machine; the result may not be published.")
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Give up when one step of a side takes longer, in seconds.")
]
StoreFile = Annotated[
    Path | None, typer.Option("--store", help="Result store to append to. [default: in the cache folder]")
]


def key_values(texts: Sequence[str] | None, option: str) -> dict[str, Any]:
    """``key=value`` items as a dictionary; values are TOML, else text. `PlanError` for an item without ``=``."""
    from hasten.core.errors import PlanError
    from hasten.core.plan import parse_value

    out: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise PlanError(f"{option} {text!r}: write key=value")
        out[key.strip()] = parse_value(value.strip())
    return out


def plan_of(text: str, base: Plan) -> Plan:
    """The plan that ``--against`` means: a dtype, a plan file, or techniques joined by ``+``, on top of ``base``."""
    from hasten.catalog.loader import technique
    from hasten.core.plan import DTYPES, Plan, parse_use

    if text in DTYPES:
        return replace(base, dtype=text)
    if text.endswith(".toml"):
        return Plan.read(text, technique)
    uses = tuple(parse_use(part, technique) for part in text.split("+"))
    return replace(base, techniques=base.techniques + uses).check()


def show(comparisons: Sequence[Comparison], data: Mapping[str, Any], json_file: Path | None) -> None:
    """Print the table and write the JSON; with ``-`` the JSON alone goes to standard output."""
    from rich.console import Console

    from hasten.measure.store import write_json

    to_stdout = json_file is not None and str(json_file) == "-"
    console = Console(stderr=to_stdout)
    console.print(table(comparisons))
    for comparison in comparisons:
        for reason in comparison.unpublishable:
            console.print(f"not to be published: {reason}", markup=False, style="yellow")
    if json_file is not None and to_stdout:
        common.print_json(data)
    elif json_file is not None:
        write_json(json_file, data)


def publish(comparisons: Sequence[Comparison], folder: Path | None) -> None:
    """Write the result to ``folder``, if one is given; `MeasureError` if it may not be published."""
    if folder is not None:
        from hasten.measure.bench import publish as write

        typer.echo(f"published: {write(comparisons, folder)}", err=True)


def table(comparisons: Sequence[Comparison]) -> Any:
    """Ratio, interval, quality and memory of each comparison; claim and target below."""
    from rich.markup import escape
    from rich.table import Table

    first = comparisons[0]
    caption = "\n".join(
        f"{name}: {' '.join(text.split())}"
        for name, text in (("claim", first.claim), ("target", first.target))
        if text
    )
    out = Table(
        title=escape(f"{first.system} on {first.workload} ({first.model})"),
        caption=escape(caption) or None,
        caption_justify="left",
    )
    for name in ("against", "speed", "95% interval", "pairs", "quality", "memory (MiB)"):
        out.add_column(name, overflow="fold")
    for c in comparisons:
        out.add_row(
            escape(f"{c.label('baseline')} ({c.plans['baseline'].get('dtype', '?')})"),
            f"[bold]{c.speedup.median:.2f}x[/bold]",
            f"{c.speedup.low:.2f} to {c.speedup.high:.2f}",
            str(c.speedup.pairs),
            escape(c.quality.text()),
            f"{c.memory.baseline_mb:.0f} → {c.memory.candidate_mb:.0f}",
        )
    return out
