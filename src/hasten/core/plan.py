"""`Plan`: which techniques, with which settings, on which model. Reads and writes TOML.

    model = "smollm2-135m-instruct"
    dtype = "auto"

    [engine]                 # optional limits, see hasten.lm.settings.EngineSettings
    max_batch = 32

    [use.gptq]               # techniques, applied in this order where a slot is additive
    bits = 4
    [use.adamas]
    budget = 128

`Plan.check` refuses every conflict before any work, with a message that names both sides and the fix.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.core.errors import ConflictError, PlanError, SettingError, UnknownNameError
from hasten.core.slots import SLOTS
from hasten.core.technique import Technique

DTYPES = ("auto", "float32", "bfloat16")
_KEYS = ("model", "dtype", "engine", "use")

Resolver = Callable[[str], type[Technique]]
Use = str | Technique


@dataclass(frozen=True)
class Plan:
    """A model, a dtype, engine settings and an ordered tuple of techniques. Immutable."""

    model: str = "smollm2-135m-instruct"
    techniques: tuple[Technique, ...] = ()
    dtype: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Plan:
        """Raise `ConflictError`/`PlanError` if the plan cannot run; return self otherwise."""
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES, "one of " + ", ".join(DTYPES))
        seen: dict[str, Technique] = {}
        claimed: dict[str, str] = {}
        for technique in self.techniques:
            if technique.slug in seen:
                raise ConflictError(f"{technique.slug} is used twice; keep one of the two entries")
            seen[technique.slug] = technique
            for name in technique.slots:
                if SLOTS[name].interface is None:
                    raise PlanError(
                        f"{technique.slug} fills slot {name!r} of the {SLOTS[name].engine} engine, which is not "
                        f"built yet; remove {technique.slug}"
                    )
                if not SLOTS[name].exclusive:
                    continue
                if name in claimed:
                    raise ConflictError(
                        f"{claimed[name]} and {technique.slug} both claim the exclusive slot {name!r} "
                        f"({SLOTS[name].question}); remove one of them"
                    )
                claimed[name] = technique.slug
        for technique in self.techniques:
            filled = {name for other in self.techniques if other is not technique for name in other.slots}
            for other, reason in technique.conflicts.items():
                if other in seen:
                    raise ConflictError(
                        f"{technique.slug} and {other} cannot be combined: {reason}; remove one of them"
                    )
            for need, reason in technique.needs.items():
                if need not in filled:
                    raise ConflictError(
                        f"{technique.slug} needs a technique in slot {need!r}: {reason}; "
                        f"add one (`hasten list --slot {need}`) or remove {technique.slug}"
                    )
        return self

    def filling(self, slot: str) -> tuple[Technique, ...]:
        """The techniques that fill ``slot``, in plan order."""
        return tuple(t for t in self.techniques if slot in t.slots)

    @property
    def lossless(self) -> bool:
        return all(t.lossless for t in self.techniques)

    def label(self) -> str:
        """Short human name: ``baseline`` or the techniques joined by `` + ``."""
        return " + ".join(t.label() for t in self.techniques) or "baseline"

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"model": self.model, "dtype": self.dtype}
        if self.engine:
            out["engine"] = dict(self.engine)
        if self.techniques:
            out["use"] = {t.slug: t.model_dump(mode="json") for t in self.techniques}
        return out

    def to_toml(self) -> str:
        """The plan as TOML that `Plan.from_toml` reads back to an equal plan.

        Raises `SettingError` for a setting that TOML cannot hold (None where that is not the default).
        """
        import tomli_w

        data = self.to_dict()
        for technique in self.techniques:
            for name, value in data["use"][technique.slug].items():
                if _holds_none(value):
                    field = type(technique).model_fields[name]
                    if value is not None or field.is_required() or field.default is not None:
                        raise SettingError(
                            f"{technique.slug}.{name} = {value!r}: TOML has no null, so this setting cannot be "
                            f"written to a plan file; its default is {field.default!r}"
                        )
        return tomli_w.dumps(_without_none(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], resolve: Resolver) -> Plan:
        """Build and check a plan from parsed TOML. ``resolve`` maps a slug to its `Technique` class."""
        for key in data:
            if key not in _KEYS:
                raise UnknownNameError("plan key", key, _KEYS, "keys: " + ", ".join(_KEYS))
        use = data.get("use", {})
        engine = data.get("engine", {})
        if not isinstance(use, Mapping) or not all(isinstance(v, Mapping) for v in use.values()):
            raise PlanError("plan: [use.SLUG] must be tables of settings, e.g. [use.gptq] with bits = 4")
        if not isinstance(engine, Mapping):
            raise PlanError("plan: [engine] must be a table of engine settings")
        for key in ("model", "dtype"):
            if key in data and not isinstance(data[key], str):
                raise PlanError(f"plan: {key} must be a string, not {data[key]!r}")
        techniques = tuple(resolve(slug)(**settings) for slug, settings in use.items())
        defaults = cls()
        return cls(
            model=data.get("model", defaults.model),
            techniques=techniques,
            dtype=data.get("dtype", defaults.dtype),
            engine=dict(engine),
        ).check()

    @classmethod
    def from_toml(cls, text: str, resolve: Resolver, source: str = "plan") -> Plan:
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source}: not valid TOML: {error}") from None
        return cls.from_dict(data, resolve)

    @classmethod
    def read(cls, path: str | Path, resolve: Resolver) -> Plan:
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(f"no plan file at {path}") from None
        except (UnicodeDecodeError, OSError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}") from None
        return cls.from_toml(text, resolve, source=str(path))

    @classmethod
    def of(
        cls,
        use: Iterable[Use] = (),
        resolve: Resolver | None = None,
        *,
        model: str | None = None,
        dtype: str = "auto",
        engine: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Build and check a plan from slugs and technique objects; ``"slug:key=value,..."`` sets fields."""
        techniques = tuple(t if isinstance(t, Technique) else parse_use(t, resolve) for t in use)
        return cls(cls.model if model is None else model, techniques, dtype, dict(engine or {})).check()


def parse_use(text: str, resolve: Resolver | None) -> Technique:
    """Parse a command-line use: ``gptq`` or ``gptq:bits=3,group_size=64`` (values as TOML, else text)."""
    if resolve is None:
        raise PlanError(f"cannot resolve {text!r}: pass Technique objects or a resolver")
    slug, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, _split(rest)):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise PlanError(f"{text!r}: write settings as slug:key=value,key=value")
        if key in settings:
            raise PlanError(f"{text!r}: {key} is set twice; keep one of the two")
        settings[key] = parse_value(value)
    return resolve(slug.strip())(**settings)


# A comma inside quotes or brackets belongs to a value: layers=[1,2],name="a,b"
_ITEM = re.compile(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|[^,])+""")


def _split(text: str) -> list[str]:
    return [item.strip() for item in _ITEM.findall(text)]


def parse_value(text: str) -> Any:
    """The value that ``text`` writes in TOML, or the text itself."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # More than a value, or a comment after it: then it was plain text.
    plain = len(parsed) != 1 or ("#" in text and text[:1] not in "\"'[")
    return text if plain else parsed["v"]


def _holds_none(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_none(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_none(item) for item in value)
    return value is None


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a setting that is None is left out and comes back as its default."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }
