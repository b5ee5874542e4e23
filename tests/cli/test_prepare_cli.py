"""`hasten prepare` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import hasten

from hasten.core.errors import HastenError, PlanError

pytestmark = pytest.mark.usefixtures("hasten_home")


def test_prepare_then_generate(tiny_path: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "notes.txt", tmp_path / "out"
    text.write_text("Rivers run to the sea; the sea is never full. " * 20, encoding="utf-8")
    made = hasten(
        "prepare", tiny_path, "--use", "adamas:budget=8", "-o", out, "--calibration", text, "--json"
    )
    data = json.loads(made.stdout)
    assert data["path"] == str(out)
    assert [name.rpartition("-")[0] for name in data["request"]["artefacts"]] == ["coordinate-spread"]
    answer = hasten("generate", "Rivers", "--raw", "-m", out, "-n", "8", "--ignore-eos", "--json")
    assert json.loads(answer.stdout)["plan"]["use"]["adamas"]["budget"] == 8
    again = hasten("prepare", tiny_path, "--use", "adamas:budget=8", "-o", out, "--calibration", text)
    assert again.stdout.strip() == str(out)


def test_bad_input(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="-o"):
        hasten("prepare", tiny_path, "--use", "adamas")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(HastenError, match="UTF-8"):
        hasten(
            "prepare",
            tiny_path,
            "--use",
            "adamas",
            "-o",
            tmp_path / "x",
            "--calibration",
            tmp_path / "latin.txt",
        )
