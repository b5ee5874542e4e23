"""`hasten list`: the systems of the catalogue. Reads data only: no system's code is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.catalog.loader import Record

_COLOURS = {"available": "green", "experimental": "yellow", "planned": "dim"}


def list_systems(
    family: Annotated[
        str | None, typer.Option("--family", "-f", help="Only this family, e.g. attention or weights.")
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", "-s", help="Only planned, experimental or available.")
    ] = None,
    slot: Annotated[
        str | None, typer.Option("--slot", help="Only what fills this slot, e.g. kv_format.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """List the systems: where each acts, whether it is lossless, and how far it is.

    Piped, it prints one system a line, fields separated by tabs: slug, family, state, slots, lossless, title.

    Examples:

      hasten list

      hasten list --state available

      hasten list --slot attention_policy --json
    """
    from hasten.catalog import loader

    found = loader.select(family=family, state=state, slot=slot)
    if as_json:
        common.print_json([record.to_dict() for record in found])
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        for record in found:
            fields = (record.slug, record.family, record.state, ",".join(record.slots))
            print(*fields, "lossless" if record.lossless else "lossy", record.title, sep="\t")


def _print_table(found: Sequence[Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not found:
        console.print("No system matches.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("system", "family", "state", "lossless"):
        table.add_column(column, no_wrap=True)
    table.add_column("slots")
    table.add_column("title")
    for record in found:
        colour = _COLOURS[record.state]
        table.add_row(
            f"[bold]{record.slug}[/]",
            record.family,
            f"[{colour}]{record.state}[/]",
            "yes" if record.lossless else "no",
            ", ".join(record.slots),
            record.title.replace("[", "\\["),
        )
    console.print(table)
    built = sum(record.built for record in found)
    console.print(f"{len(found)} systems, {built} built. `hasten show SYSTEM` prints a card.", style="dim")
