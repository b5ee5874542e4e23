"""Reads the catalogue: one TOML table per system, grouped by family in ``records/``. No torch here."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from hasten.core.errors import HastenError, NotBuiltError, UnknownNameError
from hasten.core.slots import SLOTS
from hasten.core.technique import Technique

State = Literal["planned", "experimental", "available"]
STATES: tuple[str, ...] = get_args(State)


@dataclass(frozen=True)
class Record:
    """What the catalogue knows of one system.

    ``claim`` is the paper's figure with its setting; ``target`` is what its specification asks of an
    x86-64 CPU; ``technique`` is ``module:Class`` once code exists; ``workload`` is the job it is compared on.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load(self) -> type[Technique]:
        """Import and return the technique's class; raise `NotBuiltError` while it is planned."""
        if self.state == "planned" or not self.technique:
            raise NotBuiltError(
                f"{self.slug} is planned: no code exists yet (`hasten list --state available` shows what runs)"
            )
        module, _, name = self.technique.partition(":")
        found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, Technique)):
            raise HastenError(f"catalogue: {self.technique} of {self.slug} is not a Technique class")
        return found


@cache
def records() -> dict[str, Record]:
    """All records by slug, in family and file order."""
    out: dict[str, Record] = {}
    folder = resources.files("hasten.catalog").joinpath("records")
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".toml"):
            continue
        family = entry.name.removesuffix(".toml")
        for table in tomllib.loads(entry.read_text(encoding="utf-8"))["system"]:
            record = _record(family, table)
            if record.slug in out:
                raise HastenError(f"catalogue: {record.slug} is recorded twice")
            out[record.slug] = record
    return out


def _record(family: str, table: dict[str, Any]) -> Record:
    known = {f.name for f in fields(Record)} - {"family"}
    for key in table:
        if key not in known:
            raise UnknownNameError("catalogue field", key, known, f"in {family}.toml")
    slots = tuple(table.pop("slots"))
    for name in slots:
        if name not in SLOTS:
            raise UnknownNameError("slot", name, SLOTS, f"record {table['slug']} in {family}.toml")
    record = Record(family=family, slots=slots, **table)
    if record.state not in STATES:
        raise UnknownNameError("state", record.state, STATES, f"record {record.slug}")
    return record


def record(slug: str) -> Record:
    """The record of ``slug``; `UnknownNameError` with the nearest slugs otherwise."""
    try:
        return records()[slug]
    except KeyError:
        raise UnknownNameError("technique", slug, records(), "`hasten list` shows all") from None


def technique(slug: str) -> type[Technique]:
    """The `Technique` class of ``slug``: the resolver that plans use."""
    return record(slug).load()
