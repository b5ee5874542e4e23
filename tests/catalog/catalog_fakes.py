"""A technique that exists only for tests: one setting of every kind a card must print."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hasten.core.technique import Technique


class Fake(Technique):
    """Reads fewer tokens.

    A second paragraph.
    """

    slug = "fake"
    slots = ("attention_policy",)
    lossless = False

    budget: int = Field(256, ge=1, le=4096, description="tokens a row reads")
    mode: Literal["group", "head"] = Field("group", description="one choice per group | per head")
    cut: float | None = Field(None, gt=0, description="cut point")
    layers: tuple[int, ...] = Field((0, 1), description="dense layers")
    exact: bool = Field(True, description="no rounding")


class Trained(Technique):
    """A technique of an engine that is not for language models, with a setting that has no default."""

    slug = "trained"
    slots = ("adaptation",)
    lossless = True

    rank: int = Field(description="rank of the update")


class Bare(Technique):
    """No settings at all."""

    slug = "bare"
    slots = ("kv_format",)
    lossless = True
