"""Techniques store validated settings; every refusal names the technique, the setting and the choices."""

from __future__ import annotations

import contextlib
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from hasten.core.errors import SettingError, UnknownNameError
from hasten.core.technique import Technique


class Rounding(Technique):
    """A technique with the kinds of settings that real ones have."""

    slug: ClassVar[str] = "rounding"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    bits: int = Field(4, ge=2, le=8)
    group_size: int = 128
    mode: Literal["nearest", "floor"] = "nearest"
    skip: tuple[int, ...] = ()
    damping: float | None = None
    names: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _whole_groups(self) -> Rounding:
        if self.group_size % self.bits:
            raise ValueError("group_size must be a multiple of bits")
        return self


class Needy(Technique):
    slug: ClassVar[str] = "needy"
    slots: ClassVar[tuple[str, ...]] = ("drafter",)
    lossless: ClassVar[bool] = True

    path: str


def test_defaults_and_settings():
    assert Rounding().bits == 4
    assert Rounding(bits=2, mode="floor") == Rounding(mode="floor", bits=2)
    assert hash(Needy(path="a")) == hash(Needy(path="a"))


def test_settings_cannot_change():
    with pytest.raises(ValidationError):
        Rounding().bits = 3


def test_unknown_setting_suggests_and_lists():
    with pytest.raises(UnknownNameError) as caught:
        Rounding(bit=3)
    text = str(caught.value)
    assert "unknown setting of rounding 'bit'; did you mean 'bits'?" in text
    assert "group_size=128" in text
    assert "names=[]" in text


@pytest.mark.parametrize("name", ["self", "slug", "", "model_config", "übits"])
def test_names_that_are_no_settings(name):
    with pytest.raises(UnknownNameError, match="unknown setting of rounding"):
        Rounding(**{name: 1})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": 9}, "rounding.bits = 9"),
        ({"bits": "four"}, "rounding.bits = 'four'"),
        ({"bits": 4.5}, "rounding.bits = 4.5"),
        ({"bits": None}, "rounding.bits = None"),
        ({"bits": 10**400}, "rounding.bits = 1000"),
        ({"mode": "ceil"}, "rounding.mode = 'ceil'"),
        ({"skip": [1, "x"]}, "rounding.skip.1 = 'x'"),
        ({"group_size": 33}, "group_size must be a multiple of bits"),
    ],
)
def test_a_wrong_value_names_setting_value_and_reason(settings, named):
    with pytest.raises(SettingError) as caught:
        Rounding(**settings)
    assert named in str(caught.value)
    assert "bits=4" in str(caught.value)


def test_a_required_setting_is_called_required():
    with pytest.raises(SettingError, match=r"needy\.path.*path \(required\)"):
        Needy()


def test_a_class_with_an_unknown_slot_or_need_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown slot 'drafters'; did you mean 'drafter'"):
        type("Bad", (Technique,), {"slots": ("drafters",), "__module__": __name__})
    with pytest.raises(UnknownNameError, match="unknown slot 'kv'"):
        type("Bad", (Technique,), {"slots": (), "needs": {"kv": "why"}, "__module__": __name__})


def test_label_shows_what_differs_from_the_defaults():
    assert Rounding().label() == "rounding"
    assert Rounding(bits=2).label() == "rounding(bits=2)"


def test_a_slot_that_is_not_filled():
    with pytest.raises(TypeError, match="Rounding does not fill slot 'drafter'"):
        Rounding().provide("drafter", None)


@given(
    st.dictionaries(
        st.sampled_from(["bits", "group_size", "mode", "skip", "damping", "names"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_any_values_are_accepted_or_refused_with_a_setting_error(settings):
    with contextlib.suppress(SettingError):
        technique = Rounding(**settings)
        assert Rounding(**technique.model_dump()) == technique or technique.damping != technique.damping
