"""`hasten models`: list, pull, locate and remove the models of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import common

app = typer.Typer(help="List, pull, locate and remove models.", no_args_is_help=True)

DEFAULT = "smollm2-135m-instruct"
Name = Annotated[str, typer.Argument(help="A name of `hasten models list`, or a Hugging Face id.")]


@app.command("list")
def list_models(as_json: common.AsJson = False) -> None:
    """Show the known models and those pulled from the hub, with state, size and licence."""
    from rich.console import Console
    from rich.table import Table

    from hasten.core.fetch import human_bytes
    from hasten.models.store import entries

    found = entries()
    if as_json:
        common.print_json([entry.to_dict() for entry in found])
        return
    table = Table(box=None, header_style="bold", expand=True)
    for column in ("name", "state", "size", "licence"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", ratio=1)
    for entry in found:
        state = "opt-in" if entry.opt_in and entry.state == "absent" else entry.state
        table.add_row(entry.name, state, human_bytes(entry.bytes), entry.license, entry.title)
    Console().print(table)


@app.command()
def pull(
    name: Name = DEFAULT,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Take the model's bytes from this file instead of the network."),
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Fetch a model into the store; does nothing when it is there. Without a name: the default model.

    Examples:

      hasten models pull

      hasten models pull smollm2-135m-instruct --from SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from rich.console import Console

    from hasten.core.fetch import human_bytes
    from hasten.models import store
    from hasten.models.known import known_models

    console = Console(stderr=True)
    model = known_models().get(name)
    if model is not None and model.opt_in:
        console.print(
            f"{name}: {human_bytes(model.asset.size)}, licence {model.license}; {model.opt_in}",
            highlight=False,
        )
    path = store.pull(name, source)
    if as_json:
        common.print_json({"name": name, "path": str(path)})
    else:
        print(path)


@app.command()
def path(name: Name = DEFAULT, as_json: common.AsJson = False) -> None:
    """Print where a model lies; fails when it is not pulled. Never uses the network."""
    from hasten.models.store import resolve

    found = resolve(name, allow_pull=False)
    if as_json:
        common.print_json({"name": name, "path": str(found)})
    else:
        print(found)


@app.command()
def remove(
    name: Annotated[
        str, typer.Argument(help="A model of the store. Files outside the store are never touched.")
    ],
    as_json: common.AsJson = False,
) -> None:
    """Delete a pulled model, or what an unfinished pull left."""
    from hasten.core.fetch import human_bytes
    from hasten.models.store import remove as remove_model

    freed = remove_model(name)
    if as_json:
        common.print_json({"name": name, "freed_bytes": freed})
    else:
        print(f"removed {name}: {human_bytes(freed)} freed")
