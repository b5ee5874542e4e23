"""Options that shrink or grow a job: typed, and refused by name when wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hasten.core.errors import SettingError, UnknownNameError


class JobOptions(BaseModel):
    """Base of a workload's options; each subclass describes its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, job: str, values: Mapping[str, Any] | None) -> Self:
        """Raises `UnknownNameError` or `SettingError` naming the workload ``job``, the option and its value."""
        values = values or {}
        for name in values:
            if name not in cls.model_fields:
                raise UnknownNameError(f"option of {job}", name, cls.model_fields, cls.describe())
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "options"
            raise SettingError(
                f"{job}: option {where} = {first.get('input')!r}: {first['msg']} ({cls.describe()})"
            ) from None

    @classmethod
    def describe(cls) -> str:
        """One line naming every option and its default."""
        return "options: " + ", ".join(
            f"{name}={field.default!r}" for name, field in cls.model_fields.items()
        )
