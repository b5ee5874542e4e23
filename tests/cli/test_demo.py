"""`hasten demo`: its flow and its table, with measurements that are made up; what it shows is in the catalogue."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from cli_run import hasten
from rich.console import Console

from hasten import workloads
from hasten.catalog import loader
from hasten.cli import common
from hasten.cli import demo as demo_command
from hasten.core.errors import MeasureError, UnknownNameError
from hasten.measure.comparison import Comparison, Memory, Quality
from hasten.measure.statistics import Interval
from hasten.measure.store import ResultStore


def comparison(use: str, workload: str, **more: Any) -> Comparison:
    slug = use.partition(":")[0]
    values: dict[str, Any] = {
        "system": slug,
        "workload": workload,
        "plans": {
            "baseline": {"label": "baseline", "model": "tiny", "dtype": "bfloat16"},
            "candidate": {"label": f"{slug}[8]", "model": "tiny", "dtype": "auto"},
        },
        "speedup": Interval(1.5, 1.25, 1.75, 5),
        "quality": Quality("perplexity", 12.0, 12.6, "lower"),
        "memory": Memory(640.4, 320.6),
        "claim": "",
        "target": "",
        "machine": {"cpu": "test"},
        "commit": None,
        "model": "tiny",
        "unit": "tokens",
        "runs": {},
        "created": "2026-01-02T03:04:05+00:00",
        "id": f"{slug}-{workload}",
        "unpublishable": ("before the runs, another job kept a core busy",),
    }
    return Comparison(**{**values, **more})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tiny_path) -> list[tuple[str, str, int]]:
    """Replaces measuring; the answer is real, from the tiny model. Holds what was asked for."""
    asked: list[tuple[str, str, int]] = []

    def measure(
        use: str, workload: str, options: dict[str, Any], model: str | None, pairs: int
    ) -> Comparison:
        assert model == str(tiny_path)
        asked.append((use, workload, pairs))
        return comparison(use, workload)

    make_plan = common.make_plan
    monkeypatch.setattr(common, "make_plan", lambda *a: replace(make_plan(*a), dtype="float32"))
    monkeypatch.setattr(demo_command, "measure", measure)
    return asked


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what needs no more than the catalogue can resolve today."""
    shown = tuple(row for row in demo_command.SHOWN if loader.record(row[0].partition(":")[0]).built)
    assert shown
    monkeypatch.setattr(demo_command, "SHOWN", shown)


def test_what_it_shows_exists():
    assert [loader.record(use.partition(":")[0]).workload for use, *_ in demo_command.SHOWN] == [
        workload for _, workload, _ in demo_command.SHOWN
    ]
    assert all(workloads.get(workload) for _, workload, _ in demo_command.SHOWN)


def test_the_flow(measured, built, tiny_path, tmp_path, hasten_home):
    page = tmp_path / "out" / "demo.html"
    result = hasten("demo", "--model", tiny_path, "--output", page, "--pairs", "6")
    assert result.exit_code == 0
    assert measured == [(use, workload, 6) for use, workload, _ in demo_command.SHOWN]
    out = result.stdout
    assert out.startswith(demo_command.QUESTION)
    assert "tokens/s" in out
    for text in ("1.50x", "1.25 to 1.75", "perplexity 12 → 12.6 (-5.00% worse)", "640 → 321"):
        assert out.count(text) == len(measured)
    assert out.count("not to be published: before the runs, another job kept a core busy") == 1
    assert out.rstrip().endswith(f"Report: {page}")
    assert "perplexity" in page.read_text(encoding="utf-8")
    assert {c.workload for c in ResultStore().all()} == {workload for _, workload, _ in demo_command.SHOWN}


def test_json_alone_on_standard_output(measured, built, tiny_path, tmp_path, hasten_home):
    result = hasten("demo", "--model", tiny_path, "-o", tmp_path / "demo.html", "--json")
    found = [Comparison.from_dict(data) for data in json.loads(result.stdout)]
    assert [c.workload for c in found] == [workload for _, workload, _ in measured]
    assert demo_command.QUESTION in result.stderr


def test_refused_before_anything_is_measured(measured, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_command, "SHOWN", (("adams", "decode", {}),))
    with pytest.raises(UnknownNameError, match="did you mean 'adamas'"):
        hasten("demo", "--model", tiny_path, "-o", tmp_path / "demo.html")
    with pytest.raises(MeasureError, match="is a folder"):
        hasten("demo", "--model", tiny_path, "-o", tmp_path)
    assert hasten("demo", "--pairs", "1").exit_code == 2
    assert measured == []


def test_the_table():
    rows = [
        comparison("gptq:bits=4", "decode"),
        comparison("adamas", "long-decode", quality=Quality("agreement", 1.0, 1.0, "higher")),
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(demo_command.table(rows))
    text = console.export_text()
    gptq, adamas = (line for line in text.splitlines() if "x " in line and "to" in line)
    assert [cell.strip() for cell in gptq.strip("│").split("│")] == [
        "decode",
        "gptq[8]",
        "baseline (bfloat16)",
        "1.50x",
        "1.25 to 1.75",
        "perplexity 12 → 12.6 (-5.00% worse)",
        "640 → 321",
    ]
    assert "agreement 1 → 1 (equal)" in adamas
