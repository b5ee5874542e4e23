"""`hasten`: the command line. Commands import what they need when they run, so that `hasten list` stays quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hasten.cli.batch import batch
from hasten.cli.bench import bench
from hasten.cli.chat import chat
from hasten.cli.compare import compare
from hasten.cli.demo import demo
from hasten.cli.generate import generate
from hasten.cli.list import list_systems
from hasten.cli.models import app as models_app
from hasten.cli.report import report
from hasten.cli.show import show

app = typer.Typer(
    name="hasten",
    help="Makes machine-learning jobs faster, and proves it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("list")(list_systems)
app.command()(show)
app.command()(generate)
app.command()(chat)
app.command()(batch)
app.command()(bench)
app.command()(compare)
app.command()(report)
app.command()(demo)
app.add_typer(models_app, name="models")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"hasten {version('hasten')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Makes machine-learning jobs faster, and proves it."""


def main() -> None:
    """Entry point: a `HastenError` becomes one line on standard error and its exit code."""
    from hasten.core.errors import HastenError

    try:
        app()
    except HastenError as error:
        print(f"hasten: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has gone: not an error. Keep the interpreter from complaining at exit.
        sys.stdout = None  # type: ignore[assignment]
        sys.exit(0)


if __name__ == "__main__":
    main()
