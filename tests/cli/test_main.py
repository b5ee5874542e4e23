"""The program around the commands: help, unknown names, exit codes, one line per error, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cli_run import hasten
from typer.main import get_command

from hasten import __version__
from hasten.cli.main import app, main
from hasten.core import errors

COMMANDS = sorted(get_command(app).commands)


def test_every_command_of_the_issue_exists():
    assert {
        "list",
        "show",
        "bench",
        "compare",
        "generate",
        "chat",
        "batch",
        "report",
        "demo",
        "models",
    } <= set(COMMANDS)


@pytest.mark.parametrize("command", [[c] for c in COMMANDS if c != "models"] + [["models", "pull"]])
def test_help_shows_an_example(command):
    result = hasten(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"hasten {' '.join(command)}" in result.output.split("Examples:")[1]


@pytest.mark.parametrize("command", ["list", "path", "remove"])
def test_help_of_the_small_model_commands(command):
    result = hasten("models", command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_without_arguments_it_shows_the_help():
    result = hasten()
    assert result.exit_code == 2  # nothing was done
    assert all(command in result.output for command in COMMANDS)


def test_version():
    result = hasten("--version")
    assert (result.exit_code, result.stdout) == (0, f"hasten {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generat", "x"], "generat"),
        (["generate", "x", "--max-token", "3"], "--max-token"),
        (["generate", "x", "--max-tokens", "three"], "--max-tokens"),
        (["generate"], "prompt"),
        (["models", "pul"], "pul"),
    ],
)
def test_unknown_commands_and_options(arguments, named):
    result = hasten(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "error",
    [
        errors.HastenError("something"),
        errors.UnknownNameError("technique", "gptr", ["gptq"]),
        errors.UnsupportedError("not here"),
        errors.ModelError("no model"),
        errors.RequestError("no prompt"),
        errors.MeasureError("busy"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hasten.catalog.loader.select", fail)
    monkeypatch.setattr(sys, "argv", ["hasten", "list"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == error.exit_code
    assert capsys.readouterr() == ("", f"hasten: {error}\n")


def test_the_program_reports_an_error_without_traceback(program):
    done = program("show", "adamaz")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"hasten: unknown technique 'adamaz'; did you mean 'adamas'?")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["list"], ["--version"]], ids=["more than a buffer", "less"])
def test_a_reader_that_goes_away_is_no_error(environment, arguments):
    read, write = os.pipe()
    os.close(read)
    environment = {k: v for k, v in environment.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "hasten.cli.main", *arguments]
    done = subprocess.run(
        command, env=environment, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
