"""Fixtures of the command tests: the tiny model on disk, and `hasten` called in this process and as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "lm")]

PROGRAM = [sys.executable, "-m", "hasten.cli.main"]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lm_tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def environment(hasten_home: Path) -> dict[str, str]:
    """For child processes: a cache folder of their own, one thread, no colours, wide lines."""
    return {
        **os.environ,
        "HASTEN_HOME": str(hasten_home),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def program(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """``program("list", "--json", input=b"")``: run ``hasten`` as a program; bytes in, bytes out."""

    def run(*arguments: str | bytes | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*PROGRAM, *arguments], env=environment, capture_output=True, timeout=120, check=False, **more
        )

    return run
