"""The records as they are shipped: one per system, true to the code they name."""

from __future__ import annotations

from pathlib import Path

import pytest

import hasten
from hasten.catalog import cards, loader
from hasten.core.errors import NotBuiltError, UnknownNameError
from hasten.core.technique import Technique

RECORDS = loader.records()
BUILT = [slug for slug, record in RECORDS.items() if record.built]
PLANNED = [slug for slug, record in RECORDS.items() if not record.built]
ROOMS = "attention graph lm recsys retrieval rl sequence serve speech tabular text topology train vision visual weights"


def normal(title: str) -> str:
    return " ".join(title.split()).casefold()


def test_records_and_titles_match_one_to_one():
    path = Path(__file__).parents[1] / "data" / "seed_titles.txt"
    titles = [normal(line) for line in path.read_text(encoding="utf-8").splitlines()]
    recorded = [normal(record.title) for record in RECORDS.values()]
    assert len(titles) == len(set(titles)) == 119
    assert sorted(recorded) == sorted(titles)


def test_families_are_rooms_of_the_house():
    assert list(loader.families()) == ROOMS.split()


@pytest.mark.parametrize("slug", RECORDS)
def test_a_record_says_what_it_must(slug: str):
    record = RECORDS[slug]
    assert record.slug == slug == slug.lower()
    assert len(set(record.slots)) == len(record.slots) > 0
    for name in ("title", "source", "kind", "claim", "target", "workload"):
        text = getattr(record, name)
        assert text
        assert text == " ".join(text.split()), f"{name} has stray white space"
    assert record.workload == record.workload.lower().replace(" ", "-")
    assert max(len(record.claim), len(record.target)) < 400


@pytest.mark.parametrize("slug", PLANNED)
def test_a_planned_record_refuses_to_load(slug: str):
    with pytest.raises(NotBuiltError, match=rf"^{slug} is planned"):
        loader.technique(slug)


@pytest.mark.parametrize("slug", BUILT)
def test_a_built_record_agrees_with_its_code(slug: str):
    record = RECORDS[slug]
    technique = loader.technique(slug)
    assert issubclass(technique, Technique)
    assert technique.slug == slug
    assert technique.slots == record.slots
    assert technique.lossless == record.lossless
    assert technique.__doc__
    undescribed = [name for name, field in technique.model_fields.items() if not field.description]
    assert not undescribed, f"settings of {slug} without a description: {undescribed}"


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("adama", "adamas"), ("flash_atention2", "flash_attention2"), ("GPTQ", "")]
)
def test_an_unknown_slug_suggests_the_nearest(wrong: str, nearest: str):
    with pytest.raises(UnknownNameError, match=f"unknown technique '{wrong}'") as caught:
        loader.record(wrong)
    if nearest:
        assert f"did you mean '{nearest}'" in str(caught.value)


def test_the_shipped_records_cannot_be_changed():
    with pytest.raises(TypeError):
        RECORDS["mine"] = RECORDS["gptq"]


def test_select_filters_and_combines():
    assert len(loader.select()) == 119
    assert {r.family for r in loader.select(family="weights")} == {"weights"}
    chosen = loader.select(family="lm", slot="scheduler", state="planned")
    assert {r.slug for r in chosen} == {
        r.slug
        for r in RECORDS.values()
        if r.family == "lm" and "scheduler" in r.slots and r.state == "planned"
    }
    assert "fastgen" in {r.slug for r in loader.select(family="lm", slot="scheduler")}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"family": "weight"}, r"unknown family 'weight'; did you mean 'weights'"),
        ({"state": "done"}, r"unknown state 'done'.*planned, experimental, available"),
        ({"slot": "kvformat"}, r"unknown slot 'kvformat'; did you mean 'kv_format'"),
    ],
)
def test_select_refuses_unknown_values(filters: dict[str, str], message: str):
    with pytest.raises(UnknownNameError, match=message):
        loader.select(**filters)


@pytest.mark.parametrize("slug", [slug for slug in BUILT if RECORDS[slug].state == "available"])
def test_an_available_system_has_published_a_comparison(slug: str):
    """The rule of the states: nothing is available without a measured ratio and an acceptance file."""
    checkout = cards.source_checkout()
    assert checkout is not None
    assert cards.published_of(RECORDS[slug], checkout) is not None
    assert (checkout / "tests" / "acceptance" / f"{slug}.py").is_file()


def test_what_is_beside_the_systems_resolves_and_is_listed_apart():
    beside = loader.beside()
    assert not set(beside) & set(RECORDS)
    assert set(beside) == {r.slug for r in loader.select(family="engine")}
    for slug, record in beside.items():
        kind = loader.technique(slug)
        assert (kind.slug, kind.lossless, kind.slots) == (slug, record.lossless, record.slots)
        assert getattr(hasten, kind.__name__) is kind
