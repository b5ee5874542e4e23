"""`hasten report`: everything measured, as one HTML page or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import common


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparisons as a JSON array instead of writing HTML.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="Only this system.")] = None,
    workload: Annotated[str | None, typer.Option("--workload", help="Only this workload.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All comparisons, not just the newest of each kind.")
    ] = False,
    imports: Annotated[
        list[Path] | None,
        typer.Option("--import", help="Add the comparisons of a JSON file to the store first. Repeatable."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Result store to read. [default: in the cache folder]")
    ] = None,
) -> None:
    """Write one self-contained HTML page of the measured speed and quality of every system.

    Examples:

      hasten report

      hasten report -o results.html --workload long-decode

      hasten report --import benchmarks/results/adamas.json --json > results.json
    """
    from hasten.measure.report import render
    from hasten.measure.store import ResultStore, write_text

    results = ResultStore(store)
    for path in imports or ():
        results.import_json(path)
    found = results.all(system, workload) if everything else results.latest(system, workload)
    if as_json:
        common.print_json([comparison.to_dict() for comparison in found])
        return
    write_text(output, render(found))
    typer.echo(f"{output.resolve()}: {len(found)} comparisons")
