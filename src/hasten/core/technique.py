"""`Technique`: one published way to make a job faster.

A technique stores settings and nothing else (pydantic validates them; an unknown setting is refused).
What it computes lives in the *providers* that `provide` returns: one object per slot it fills, built
for one loaded model, implementing the slot's interface. A technique that needs an offline artefact
(calibration, factors, heads) implements `prepare`; see `hasten.core.artefact`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hasten.core.errors import SettingError, UnknownNameError
from hasten.core.slots import slot as find_slot

if TYPE_CHECKING:
    from collections.abc import Mapping


class Technique(BaseModel):
    """Settings of one system. Subclasses add fields (with ``Field(description=...)``) and ``provide``.

    Class attributes
        slug: the catalogue name.
        slots: names of the slots this technique fills (see `hasten.core.slots`).
        lossless: token-identical greedy output (up to documented floating-point ties), or the same
            sampling distribution.
        conflicts: slug -> reason, for pairs that exclude each other although no slot says so.
        needs: slot name -> reason, for a slot that another technique of the plan must fill.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    slug: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    lossless: ClassVar[bool]
    conflicts: ClassVar[Mapping[str, str]] = {}
    needs: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (*cls.__dict__.get("slots", ()), *cls.__dict__.get("needs", ())):
            find_slot(name)

    def __init__(self, /, **settings: Any) -> None:
        fields = type(self).model_fields
        for name in settings:
            if name not in fields:
                raise UnknownNameError(f"setting of {self.slug}", name, fields, self.describe_settings())
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "settings"
            raise SettingError(
                f"{self.slug}.{where} = {first.get('input')!r}: {first['msg']} ({self.describe_settings()})"
            ) from None

    @classmethod
    def describe_settings(cls) -> str:
        """One line naming every setting and its default, for error messages and ``hasten show``."""
        parts = [
            f"{name} (required)"
            if field.is_required()
            else f"{name}={field.get_default(call_default_factory=True, validated_data={})!r}"
            for name, field in cls.model_fields.items()
        ]
        return "settings: " + (", ".join(parts) if parts else "none")

    def provide(self, slot: str, context: Any) -> Any:
        """Return this technique's implementation of ``slot`` for one loaded model.

        ``context`` is the engine's build context (`hasten.models.context.BuildContext` for the LM
        engine): model config, weights, tokenizer, dtype, artefact folder, seed. Raises
        `UnsupportedError` when the model or machine cannot run the technique.
        """
        raise TypeError(f"{type(self).__name__} does not fill slot {slot!r}")

    def label(self) -> str:
        """``slug`` or ``slug(a=1)`` with the settings that differ from their defaults."""
        changed = self.model_dump(exclude_defaults=True)
        inner = ", ".join(f"{k}={v}" for k, v in changed.items())
        return f"{self.slug}({inner})" if inner else self.slug
