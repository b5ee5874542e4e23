"""`hasten`: the command line. Commands import what they need when they run, so that `hasten list` stays quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hasten.cli.batch import batch
from hasten.cli.bench import bench
from hasten.cli.bench_kernels import bench_kernels
from hasten.cli.chat import chat
from hasten.cli.compare import compare
from hasten.cli.demo import demo
from hasten.cli.generate import generate
from hasten.cli.list import list_systems
from hasten.cli.models import app as models_app
from hasten.cli.prepare import prepare
from hasten.cli.report import report
from hasten.cli.show import show


class _Commands(TyperGroup):
    """The group of commands; a reader of the output that has gone (``| head``) ends a command quietly."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit from None


def _drop_output() -> None:
    """What Python still has to write to standard output when it exits goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="hasten",
    cls=_Commands,
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
app.command("bench-kernels")(bench_kernels)
app.command()(compare)
app.command()(prepare)
app.command()(report)
app.command()(demo)
app.add_typer(models_app, name="models")


def _version(value: bool) -> None:
    if value:
        from hasten import __version__

        print(f"hasten {__version__}")
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
        app(prog_name="hasten")
    except HastenError as error:
        print(f"hasten: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        try:
            sys.stdout.flush()  # a closed pipe shows here, not when Python exits
        except BrokenPipeError:
            _drop_output()


if __name__ == "__main__":
    main()
