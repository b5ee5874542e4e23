"""`hasten list` and `hasten show`: filters, formats, errors, and that neither loads torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from hasten.catalog import loader
from hasten.cli import list as list_command
from hasten.cli.list import list_systems
from hasten.cli.show import show
from hasten.core.errors import UnknownNameError

APP = typer.Typer()
APP.command("list")(list_systems)
APP.command()(show)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_prints_one_line_a_system():
    lines = [line.split("\t") for line in run("list").splitlines()]
    assert [line[0] for line in lines] == list(loader.records())
    assert {len(line) for line in lines} == {6}
    gptq = next(line for line in lines if line[0] == "gptq")
    assert gptq[1] == "weights"
    assert gptq[3:] == ["weight_format", "lossy", loader.record("gptq").title]


def test_list_filters():
    lines = run("list", "--family", "lm", "--slot", "kv_format").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["palu", "quantspec"]


def test_list_as_json_holds_whole_records():
    found = json.loads(run("list", "--family", "weights", "--json"))
    assert found == [record.to_dict() for record in loader.select(family="weights")]
    assert json.loads(run("list", "--family", "text", "--slot", "drafter", "--json")) == []


def test_list_refuses_an_unknown_filter():
    with pytest.raises(UnknownNameError, match="unknown family 'weigths'; did you mean 'weights'"):
        run("list", "--family", "weigths")


def test_list_draws_a_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    list_command._print_table(loader.select(family="visual"))
    out = capsys.readouterr().out
    assert "framefusion" in out
    assert "visual_tokens" in out
    assert "16 systems" in out
    list_command._print_table([])
    assert "No system matches" in capsys.readouterr().out


def test_show_prints_the_card_as_markdown():
    out = run("show", "hydragen")
    assert out.startswith("# Hydragen: High-Throughput LLM Inference with Shared Prefixes\n")
    assert "arXiv 2402.05099" in out
    assert loader.record("hydragen").claim in out


def test_show_as_json():
    card = json.loads(run("show", "endor", "--json"))
    assert card["slug"] == "endor"
    assert card["slots"] == ["weight_format"]
    assert {"settings", "published", "claim", "target"} <= set(card)


def test_show_suggests_the_nearest_system():
    with pytest.raises(UnknownNameError, match="unknown technique 'hydragn'; did you mean 'hydragen'"):
        run("show", "hydragn")


@pytest.mark.parametrize(
    "call",
    ["list_systems()", "list_systems(slot='drafter', as_json=True)"],
)
def test_listing_never_imports_torch(call: str):
    code = (
        f"import sys; from hasten.cli.list import list_systems; {call}; "
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantspec" in done.stdout
