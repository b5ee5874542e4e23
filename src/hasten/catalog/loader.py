"""Reads the catalogue: one TOML table per system, grouped by family in ``records/``.

Neither torch nor pydantic is imported here until a technique's class is asked for, so that a listing is instant.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from hasten.core.errors import HastenError, NotBuiltError, UnknownNameError
from hasten.core.slots import SLOTS

if TYPE_CHECKING:
    from hasten.core.technique import Technique

State = Literal["planned", "experimental", "available"]
STATES: tuple[str, ...] = get_args(State)
ENGINE = "engine"  # the family of what is `beside` the systems


@dataclass(frozen=True)
class Record:
    """What the catalogue knows of one system.

    slug: its name in plans, file names and commands. family: the room of the house, the record's file name.
    source: authors, venue, arXiv number. kind: what sort of method, whether it is trained, what it loses.
    claim: the paper's figure with its setting. target: what is asked of an x86-64 CPU before the system counts
    as available. slots: names of `hasten.core.slots`. lossless: see `hasten.core.technique.Technique`.
    technique: ``module:Class`` once code exists. workload: the job it is compared on.
    """

    slug: str
    title: str
    source: str
    family: str
    kind: str
    claim: str
    slots: tuple[str, ...]
    lossless: bool
    state: State = "planned"
    target: str = ""
    technique: str = ""
    workload: str = ""

    @property
    def built(self) -> bool:
        return self.state != "planned"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, fields in order of declaration."""
        return {**asdict(self), "slots": list(self.slots)}

    def load(self) -> type[Technique]:
        """Import and return the technique's class.

        Raises `NotBuiltError` while it is planned, and `HastenError` when the import path leads nowhere or to
        something that is not a `Technique`. A missing optional dependency raises its own `ImportError`.
        """
        if not self.built:
            raise NotBuiltError(
                f"{self.slug} is planned: no code exists yet (`hasten list --state available` shows what runs)"
            )
        from hasten.core.technique import Technique

        module, _, name = self.technique.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise HastenError(
                f"catalogue: {self.slug} names {self.technique}, but there is no module {error.name}"
            ) from None
        if not (isinstance(found, type) and issubclass(found, Technique)):
            raise HastenError(f"catalogue: {self.technique} of {self.slug} is not a Technique class")
        return found


def read_records(folder: Traversable) -> dict[str, Record]:
    """Read every ``FAMILY.toml`` of ``folder``: all records by slug, in family and file order.

    Raises `HastenError` for broken TOML, a missing field, a field of the wrong type, a slug that is no identifier
    or occurs twice, and a state without (or with a superfluous) import path; `UnknownNameError` for an unknown
    field, slot or state. Every message names the file and the record.
    """
    out: dict[str, Record] = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".toml"):
            continue
        for table in _tables(entry):
            record = _record(entry.name, table)
            if record.slug in out:
                first = out[record.slug].family
                raise HastenError(
                    f"catalogue: {record.slug} is recorded twice, in {first}.toml and {entry.name}"
                )
            out[record.slug] = record
    return out


@cache
def records() -> Mapping[str, Record]:
    """The records of this installation by slug, in family and file order; read once, not to be changed."""
    return MappingProxyType(read_records(resources.files("hasten.catalog").joinpath("records")))


@cache
def beside() -> Mapping[str, Record]:
    """Techniques that are no system of the catalogue: first tries, and rivals that systems are compared with."""
    return MappingProxyType(read_records(resources.files("hasten.catalog").joinpath("beside")))


def record(slug: str) -> Record:
    """The record of ``slug``, a system or `beside` them; `UnknownNameError` with the nearest slugs otherwise."""
    found = records().get(slug) or beside().get(slug)
    if found is None:
        raise UnknownNameError("technique", slug, (*records(), *beside()), "`hasten list` shows all")
    return found


def technique(slug: str) -> type[Technique]:
    """The `Technique` class of ``slug``: the resolver that plans use."""
    return record(slug).load()


def families() -> tuple[str, ...]:
    """The families that have records, in order."""
    return tuple(dict.fromkeys(record.family for record in records().values()))


def select(family: str | None = None, state: str | None = None, slot: str | None = None) -> list[Record]:
    """The records that match every given filter; `UnknownNameError` for a filter value that does not exist.

    Family ``engine`` are the techniques `beside` the systems; without it they are left out.
    """
    for kind, value, known in (
        ("family", family, (*families(), ENGINE)),
        ("state", state, STATES),
        ("slot", slot, tuple(SLOTS)),
    ):
        if value is not None and value not in known:
            raise UnknownNameError(kind, value, known, "one of " + ", ".join(known))
    return [
        record
        for record in (beside() if family == ENGINE else records()).values()
        if (family is None or record.family == family)
        and (state is None or record.state == state)
        and (slot is None or slot in record.slots)
    ]


def _tables(entry: Traversable) -> list[dict[str, Any]]:
    try:
        data = tomllib.loads(entry.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HastenError(f"catalogue: {entry.name} is not valid TOML: {error}") from None
    tables = data.pop("system", None)
    if data or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise HastenError(f"catalogue: {entry.name} must hold [[system]] tables and nothing else")
    return tables


def _record(file: str, table: Mapping[str, Any]) -> Record:
    slug = table.get("slug", "")
    where = f"record {slug!r} of {file}" if slug else f"a record of {file}"
    known = {f.name: f for f in fields(Record) if f.name != "family"}
    for key in table:
        if key not in known:
            raise UnknownNameError("catalogue field", key, known, f"in {where}")
    for name, field in known.items():
        if name not in table:
            if field.default is MISSING:
                raise HastenError(f"catalogue: {where} has no {name}")
        elif name == "slots":
            if not _is_names(table["slots"]):
                raise HastenError(f"catalogue: slots of {where} must be a list of at least one slot name")
        elif not isinstance(table[name], bool if name == "lossless" else str):
            raise HastenError(
                f"catalogue: {name} of {where} must be {'true or false' if name == 'lossless' else 'text'}, "
                f"not {table[name]!r}"
            )
    if not slug.isidentifier():
        raise HastenError(f"catalogue: the slug of {where} must be a valid Python identifier")
    for name in table["slots"]:
        if name not in SLOTS:
            raise UnknownNameError("slot", name, SLOTS, f"in {where}")
    record = Record(**{**table, "family": file.removesuffix(".toml"), "slots": tuple(table["slots"])})
    if record.state not in STATES:
        raise UnknownNameError("state", record.state, STATES, f"in {where}; one of {', '.join(STATES)}")
    if record.built and record.technique.count(":") != 1:
        raise HastenError(f'catalogue: {where} is {record.state}, so it needs technique = "module:Class"')
    if record.technique and not record.built:
        raise HastenError(
            f'catalogue: {where} has code ({record.technique}) but is planned; set state = "experimental"'
        )
    return record


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
