"""Plans: TOML round trip, and every conflict refused with both sides and the fix in the message."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hasten.core.errors import ConflictError, PlanError, SettingError, UnknownNameError
from hasten.core.plan import DTYPES, Plan, parse_use
from hasten.core.technique import Technique


class Rounding(Technique):
    slug: ClassVar[str] = "rounding"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    bits: int = 4
    scale: float = 1.0
    symmetric: bool = True
    note: str = ""
    skip: tuple[int, ...] = ()
    damping: float | None = None
    window: int | None = 64
    per_layer: dict[str, int] = Field(default_factory=dict)


class Pruning(Technique):
    slug: ClassVar[str] = "pruning"
    slots: ClassVar[tuple[str, ...]] = ("weight_format", "layer_hook")
    lossless: ClassVar[bool] = False


class Skipping(Technique):
    slug: ClassVar[str] = "skipping"
    slots: ClassVar[tuple[str, ...]] = ("layer_hook",)
    lossless: ClassVar[bool] = False


class Stopping(Technique):
    slug: ClassVar[str] = "stopping"
    slots: ClassVar[tuple[str, ...]] = ("stop_policy",)
    lossless: ClassVar[bool] = True
    conflicts: ClassVar[dict[str, str]] = {"skipping": "skipped layers hide the signal it reads"}


class Drafting(Technique):
    slug: ClassVar[str] = "drafting"
    slots: ClassVar[tuple[str, ...]] = ("drafter",)
    lossless: ClassVar[bool] = True
    needs: ClassVar[dict[str, str]] = {"verifier": "guesses must be checked"}


class SelfServing(Technique):
    slug: ClassVar[str] = "self_serving"
    slots: ClassVar[tuple[str, ...]] = ("verifier",)
    lossless: ClassVar[bool] = True
    needs: ClassVar[dict[str, str]] = {"verifier": "it wraps another one"}


class Optimizing(Technique):
    slug: ClassVar[str] = "optimizing"
    slots: ClassVar[tuple[str, ...]] = ("optimizer_state",)
    lossless: ClassVar[bool] = False


CLASSES = {c.slug: c for c in (Rounding, Pruning, Skipping, Stopping, Drafting, SelfServing, Optimizing)}


def resolve(slug: str) -> type[Technique]:
    try:
        return CLASSES[slug]
    except KeyError:
        raise UnknownNameError("technique", slug, CLASSES) from None


# Conflicts


def test_two_claims_on_an_exclusive_slot_name_both_and_the_fix():
    with pytest.raises(ConflictError) as caught:
        Plan.of(["rounding", "pruning"], resolve)
    text = str(caught.value)
    assert "rounding and pruning both claim the exclusive slot 'weight_format'" in text
    assert "how a linear layer stores" in text
    assert "remove one of them" in text


def test_additive_slots_stack_in_plan_order():
    plan = Plan.of(["pruning", "skipping"], resolve)
    assert [t.slug for t in plan.filling("layer_hook")] == ["pruning", "skipping"]
    assert plan.filling("drafter") == ()


@pytest.mark.parametrize("order", [["stopping", "skipping"], ["skipping", "stopping"]])
def test_a_declared_conflict_names_both_sides_and_the_reason_in_either_order(order):
    with pytest.raises(ConflictError) as caught:
        Plan.of(order, resolve)
    text = str(caught.value)
    assert "stopping and skipping cannot be combined" in text
    assert "hide the signal" in text
    assert "remove one of them" in text


def test_an_unmet_need_names_the_slot_the_reason_and_the_fix():
    with pytest.raises(ConflictError) as caught:
        Plan.of(["drafting"], resolve)
    text = str(caught.value)
    assert "drafting needs a technique in slot 'verifier': guesses must be checked" in text
    assert "hasten list --slot verifier" in text
    assert "remove drafting" in text


def test_a_need_is_met_by_another_technique_but_not_by_itself():
    class Checking(Technique):
        slug: ClassVar[str] = "checking"
        slots: ClassVar[tuple[str, ...]] = ("verifier",)
        lossless: ClassVar[bool] = True

    Plan.of([Drafting(), Checking()])
    with pytest.raises(ConflictError, match="self_serving needs a technique in slot 'verifier'"):
        Plan.of([SelfServing()])


def test_a_technique_used_twice():
    with pytest.raises(ConflictError, match="skipping is used twice; keep one"):
        Plan.of(["skipping", "skipping"], resolve)


def test_a_slot_of_an_engine_that_is_not_built():
    with pytest.raises(
        PlanError, match=r"optimizing fills slot 'optimizer_state' of the train engine.*remove"
    ):
        Plan.of(["optimizing"], resolve)


def test_an_unknown_dtype():
    with pytest.raises(UnknownNameError, match=r"unknown dtype 'float23'; did you mean 'float32'"):
        Plan.of([], dtype="float23")


# What a plan says of itself


def test_label_and_losslessness():
    assert Plan().label() == "baseline"
    assert Plan().lossless
    plan = Plan.of([Rounding(bits=3), Stopping()])
    assert plan.label() == "rounding(bits=3) + stopping"
    assert not plan.lossless
    assert Plan.of(["stopping"], resolve).lossless


# TOML

toml_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
roundings = st.builds(
    Rounding,
    bits=st.integers(-(2**62), 2**62),
    scale=st.floats(allow_nan=False, allow_infinity=True),
    symmetric=st.booleans(),
    note=toml_text,
    skip=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    damping=st.none() | st.floats(allow_nan=False),
    window=st.integers(),
    per_layer=st.dictionaries(toml_text, st.integers(), max_size=3),
)
plans = st.builds(
    lambda model, dtype, engine, rounding, others: Plan.of(
        [rounding, *others], model=model, dtype=dtype, engine=engine
    ),
    model=toml_text.filter(bool),
    dtype=st.sampled_from(DTYPES),
    engine=st.dictionaries(toml_text, st.integers() | st.booleans() | toml_text, max_size=3),
    rounding=roundings,
    others=st.lists(st.sampled_from([Stopping()]), max_size=1),
)


@given(plans)
def test_toml_round_trip(plan):
    assert Plan.from_toml(plan.to_toml(), resolve) == plan


@given(plans)
def test_dict_round_trip(plan):
    assert Plan.from_dict(plan.to_dict(), resolve) == plan


def test_order_of_techniques_survives():
    plan = Plan.of(["stopping", "rounding"], resolve)
    assert [t.slug for t in Plan.from_toml(plan.to_toml(), resolve).techniques] == ["stopping", "rounding"]


def test_a_none_that_toml_cannot_hold_is_refused():
    with pytest.raises(SettingError, match=r"rounding\.window = None: TOML has no null.*default is 64"):
        Plan.of([Rounding(window=None)]).to_toml()


def test_an_empty_plan_file_is_the_baseline():
    assert Plan.from_toml("", resolve) == Plan()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("model = ", PlanError, "plan: not valid TOML"),
        ("modle = 'x'", UnknownNameError, "unknown plan key 'modle'; did you mean 'model'"),
        ("use = 3", PlanError, r"\[use.SLUG\] must be tables"),
        ("[use]\nrounding = 4", PlanError, r"\[use.SLUG\] must be tables"),
        ("engine = []", PlanError, r"\[engine\] must be a table"),
        ("model = 3", PlanError, "model must be a string, not 3"),
        ("dtype = true", PlanError, "dtype must be a string, not True"),
        ("dtype = 'int4'", UnknownNameError, "unknown dtype 'int4'"),
        ("[use.roundng]", UnknownNameError, "unknown technique 'roundng'; did you mean 'rounding'"),
        (
            "[use.rounding]\nbit = 3",
            UnknownNameError,
            "unknown setting of rounding 'bit'; did you mean 'bits'",
        ),
        ("[use.rounding]\nself = 3", UnknownNameError, "unknown setting of rounding 'self'"),
        ("[use.rounding]\nbits = 'x'", SettingError, "rounding.bits = 'x'"),
        ("[use.rounding]\n[use.rounding]", PlanError, "not valid TOML"),
        ("[use.rounding]\n[use.pruning]", ConflictError, "rounding and pruning"),
        ("\ufeffmodel = 'x'", PlanError, "not valid TOML"),
    ],
)
def test_a_broken_plan_names_what_is_wrong(text, error, message):
    with pytest.raises(error, match=message):
        Plan.from_toml(text, resolve)


def test_reading_files(tmp_path: Path):
    path = tmp_path / "plän.toml"
    path.write_text("model = 'm'\n[use.stopping]\n", encoding="utf-8")
    assert Plan.read(path, resolve).label() == "stopping"
    path.write_bytes(b"model = '\xff'")
    with pytest.raises(PlanError, match=r"plän\.toml cannot be read as a plan"):
        Plan.read(path, resolve)
    path.write_text("model = ")
    with pytest.raises(PlanError, match=r"plän\.toml: not valid TOML"):
        Plan.read(path, resolve)
    with pytest.raises(PlanError, match="no plan file at"):
        Plan.read(tmp_path / "absent.toml", resolve)
    for unreadable in (tmp_path, path / "x", tmp_path / ("n" * 300)):
        with pytest.raises(PlanError, match="cannot be read as a plan"):
            Plan.read(unreadable, resolve)


# The command line's way to write a use


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("rounding", {}),
        ("rounding:", {}),
        (" rounding : bits = 3 ", {"bits": 3}),
        ("rounding:bits=3,scale=0.5", {"bits": 3, "scale": 0.5}),
        ("rounding:symmetric=false,note=hello world", {"symmetric": False, "note": "hello world"}),
        ("rounding:skip=[1,2],bits=2", {"skip": (1, 2), "bits": 2}),
        ("rounding:note='a,b',bits=2", {"note": "a,b", "bits": 2}),
        ("rounding:note=a=b", {"note": "a=b"}),
        ("rounding:note=it's,bits=2", {"note": "it's", "bits": 2}),
        ("rounding:note=see #3", {"note": "see #3"}),
        ("rounding:note='3'", {"note": "3"}),
        ("rounding:note=", {"note": ""}),
    ],
)
def test_parse_use(text: str, settings: dict[str, Any]):
    assert parse_use(text, resolve) == Rounding(**settings)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("rounding:bits", PlanError, "slug:key=value"),
        ("rounding:=3", PlanError, "slug:key=value"),
        ("rounding:bits=3,bits=4", PlanError, "bits is set twice"),
        ("rounding:bit=3", UnknownNameError, "did you mean 'bits'"),
        ("rounding:bits=three", SettingError, "rounding.bits = 'three'"),
        ("rounding:bits=", SettingError, "rounding.bits = ''"),
        ("", UnknownNameError, "unknown technique ''"),
        ("drafing", UnknownNameError, "did you mean 'drafting'"),
    ],
)
def test_parse_use_refuses(text, error, message):
    with pytest.raises(error, match=message):
        parse_use(text, resolve)


def test_a_slug_without_a_resolver():
    with pytest.raises(PlanError, match="cannot resolve 'rounding'"):
        Plan.of(["rounding"])


@given(st.text(max_size=30))
def test_any_text_is_a_use_or_a_clear_error(text):
    with contextlib.suppress(PlanError, UnknownNameError):
        assert isinstance(parse_use("rounding:" + text, resolve), Rounding)
