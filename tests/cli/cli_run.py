"""Calls `hasten` in this process, errors mapped as the program maps them."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner, Result

from hasten.cli.main import app


def hasten(*arguments: str | Path, input: str | bytes | None = None) -> Result:
    """Run the command. A `HastenError` is raised, as the program's own `main` sees it; anything else as it is."""
    with mock.patch.dict(os.environ, {"COLUMNS": "200", "NO_COLOR": "1", "TERMINAL_WIDTH": "200"}):
        return CliRunner().invoke(
            app, [str(a) for a in arguments], input=input, prog_name="hasten", catch_exceptions=False
        )
