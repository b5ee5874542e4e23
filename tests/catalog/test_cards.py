"""Cards: what they print of planned and built systems, of results and of notes; and which files they refuse."""

from __future__ import annotations

import copy
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hasten.catalog import cards, loader
from hasten.catalog.loader import Record
from hasten.catalog.published import read_published
from hasten.core.errors import HastenError
from hasten.core.plan import Plan

RESULT = {
    "system": "fake",
    "workload": "long-decode",
    "plans": {"baseline": {"label": "baseline"}, "candidate": {"label": "fake(budget=64)"}},
    "speedup": {"median": 1.618, "low": 1.5, "high": 1.75, "pairs": 24},
    "quality": {"metric": "perplexity", "baseline": 12.25, "candidate": 12.5, "better": "lower"},
    "memory": {"baseline_mb": 500.4, "candidate_mb": 510},
    "claim": "2x",
    "target": "1.5x",
    "machine": {"cpu": "A Processor", "cores": 2},
    "commit": "0123456789abcdef0123",
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield __import__("catalog_fakes")
    sys.modules.pop("catalog_fakes", None)


def fake_record(name: str = "Fake", **changes: Any) -> Record:
    fields = {
        "slug": name.lower(),
        "title": "Fake: <b>Bold</b> Ideas",
        "source": "Nobody, 2026",
        "family": "attention",
        "kind": "test",
        "claim": "2x | on paper",
        "slots": ("attention_policy",),
        "lossless": False,
        "state": "experimental",
        "target": ">= 1.5x",
        "technique": f"catalog_fakes:{name}",
        "workload": "long-decode",
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    return tmp_path


def publish(checkout: Path, data: Any, slug: str = "fake") -> Path:
    path = checkout / "benchmarks" / "results" / f"{slug}.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def changed(*keys: str, value: Any = None, drop: bool = False) -> dict[str, Any]:
    data = copy.deepcopy(RESULT)
    inner: Any = data
    for key in keys[:-1]:
        inner = inner[key]
    if drop:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return data


def test_a_planned_system_says_so_and_names_its_claim():
    record = next(r for r in loader.records().values() if r.slug == "warp")
    planned = replace(record, state="planned", technique="")
    text = cards.card(planned)
    assert text.startswith(
        "# WARP: An Efficient Engine for Multi-Vector Retrieval\n\n`warp` · retrieval · **planned**"
    )
    assert record.claim in text
    assert record.target in text
    assert "`system`, a whole accelerated system beside its baseline" in text
    assert "Planned: no code exists yet" in text
    assert "No comparison is published" in text
    assert "hasten bench" not in text


@pytest.mark.parametrize("slug", loader.records())
def test_every_record_has_a_card(slug: str):
    record = loader.record(slug)
    text = cards.card(record, cards.source_checkout())
    assert record.title.replace("<", "\\<") in text
    assert record.source in text


def test_a_built_system_shows_how_to_use_it(fakes: Any):
    text = cards.card(fake_record())
    assert "Reads fewer tokens. A second paragraph." in text
    assert "hasten bench fake\n" in text
    assert "--use fake\n" in text
    assert "hasten.LLM(use=[hasten.Fake()])" in text
    assert "| `budget` | int ≥ 1, ≤ 4096 | `256` | tokens a row reads |" in text
    assert "| `mode` | `group` or `head` | `group` | one choice per group \\| per head |" in text
    assert "| `cut` | float > 0, or none | `none` | cut point |" in text
    assert "| `layers` | tuple of int, ... | `(0, 1)` | dense layers |" in text
    assert "| `exact` | bool | `true` | no rounding |" in text


def test_the_plan_on_the_card_is_a_plan(fakes: Any):
    text = cards.card(fake_record())
    table = text.split("```toml\n")[1].split("```")[0]
    plan = Plan.from_toml(table, {"fake": fakes.Fake}.__getitem__)
    assert plan.techniques == (fakes.Fake(),)
    assert tomllib.loads(table)["use"]["fake"]["layers"] == [0, 1]


def test_a_system_of_another_engine_is_not_offered_to_generate(fakes: Any):
    text = cards.card(fake_record("Trained", slots=("adaptation",), lossless=True))
    assert "hasten bench trained" in text
    assert "--use" not in text
    assert "hasten.LLM" not in text
    assert "rank = ...  # required" in text
    assert "| `rank` | int | required | rank of the update |" in text


def test_a_system_without_settings_says_so(fakes: Any):
    text = cards.card(fake_record("Bare", slots=("kv_format",), lossless=True))
    assert "It has no settings." in text
    assert "[use.bare]" in text


def test_markup_in_titles_and_cells_is_escaped(fakes: Any):
    text = cards.card(fake_record())
    assert "# Fake: \\<b>Bold\\</b> Ideas" in text
    assert "- **Claim**: 2x | on paper" in text


def test_a_published_ratio_stands_beside_its_quality(fakes: Any, checkout: Path):
    publish(checkout, RESULT)
    text = cards.card(fake_record(), checkout)
    assert "- **Speed ratio**: **1.62x**, 95% interval 1.50 to 1.75, 24 pairs of runs\n" in text
    assert "- **Quality**: perplexity 12.25 → 12.5 (lower is better)\n" in text
    assert "- **Peak memory**: 500 → 510 MiB\n" in text
    assert "- **Candidate**: `fake(budget=64)`\n" in text
    assert "- **Machine**: A Processor\n" in text
    assert "- **Commit**: `0123456789ab`\n" in text
    assert "Caution" not in text


def test_doubts_about_a_result_are_shown(fakes: Any, checkout: Path):
    publish(checkout, {**RESULT, "unpublishable": ["the machine was busy"]})
    assert "- **Caution**: the machine was busy\n" in cards.card(fake_record(), checkout)


def test_plans_and_machine_may_be_plain_text(checkout: Path):
    plain = {**RESULT, "plans": {"baseline": "a", "candidate": "b"}, "machine": "A Processor"}
    found = read_published(publish(checkout, plain))
    assert found is not None
    assert (found.baseline, found.candidate, found.machine) == ("a", "b", "A Processor")
    assert found.headline() == "1.62x [1.50, 1.75] · perplexity 12.25 → 12.5"


def test_no_file_means_nothing_published(checkout: Path):
    assert cards.published_of(fake_record(), checkout) is None
    assert cards.published_of(fake_record(), None) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"system": "fake"', r"fake.json is not valid JSON"),
        ("[]", r"fake.json has no system"),
        (changed("system", value="other"), r"fake.json holds a comparison of other, not of fake"),
        (changed("speedup", "low", drop=True), r"fake.json has no speedup.low"),
        (changed("speedup", "median", value="2x"), r"speedup.median must be a finite number, not '2x'"),
        (
            changed("speedup", "median", value=float("nan")),
            r"speedup.median must be a finite number, not nan",
        ),
        (
            changed("memory", "baseline_mb", value=True),
            r"memory.baseline_mb must be a finite number, not True",
        ),
        (changed("quality", drop=True), r"fake.json has no quality.better"),
        (
            changed("quality", "better", value="bigger"),
            r"quality.better must be higher or lower, not 'bigger'",
        ),
        (changed("commit", value=None), r"commit must be text, not None"),
    ],
)
def test_a_broken_result_is_refused_by_field(checkout: Path, data: Any, message: str):
    path = publish(checkout, data)
    with pytest.raises(HastenError, match=message):
        read_published(path)


def test_bytes_that_are_not_text_are_refused(checkout: Path):
    path = publish(checkout, RESULT)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HastenError, match=r"fake.json cannot be read"):
        read_published(path)


@pytest.mark.parametrize("mark", ["##", "###", "####"])
def test_notes_come_without_their_title_and_below_the_card(fakes: Any, checkout: Path, mark: str):
    notes = f"# Notes on fake\n\nBound by memory.\n\n{mark} Why\n\n```sh\n# a comment\n```\n\n{mark}# More\n\nText.\n"
    (checkout / "docs" / "notes" / "fake.md").write_text(notes, encoding="utf-8")
    text = cards.card(fake_record(), checkout)
    assert text.endswith(
        "## Notes\n\nBound by memory.\n\n### Why\n\n```sh\n# a comment\n```\n\n#### More\n\nText.\n"
    )
    assert "## Notes" not in cards.card(fake_record("Bare"), checkout)


def test_the_index_links_every_card_by_family(checkout: Path):
    publish(checkout, {**RESULT, "system": "gptq"}, "gptq")
    text = cards.index(loader.records().values(), checkout)
    for record in loader.records().values():
        assert f"[`{record.slug}`]({record.slug}.md)" in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(loader.families())
    row = next(line for line in text.splitlines() if "gptq.md" in line)
    assert "1.62x [1.50, 1.75] · perplexity" in row


def test_the_checkout_is_found_from_a_folder_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "src" / "hasten" / "deep").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "hasten"\n')
    monkeypatch.setattr(cards, "__file__", "/nowhere/cards.py")
    monkeypatch.chdir(tmp_path / "src" / "hasten" / "deep")
    assert cards.source_checkout() == tmp_path
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert cards.source_checkout() is None
    (tmp_path / "pyproject.toml").write_text("not toml [")
    assert cards.source_checkout() is None
