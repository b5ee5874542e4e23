"""A prepared folder: a model, a plan, and everything that the plan's techniques compute or train once.

    DIR/plan.toml          the plan; its model is a path inside DIR
    DIR/model/             the checkpoint, as it was
    DIR/artefacts/         what was computed for it: safetensors, each folder with the digests of its files
    DIR/calibration.safetensors   the caller's calibration tokens, if there were any
    DIR/provenance.json    what it was made of and with; written last

`hasten.prepare` writes one, ``hasten.LLM(DIR)`` loads it. Nothing is computed then: what is missing is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from hasten.catalog import loader
from hasten.core.errors import ArtefactError
from hasten.core.plan import Plan

PLAN, PROVENANCE, CALIBRATION = "plan.toml", "provenance.json", "calibration.safetensors"
MODEL, ARTEFACTS = "model", "artefacts"


@dataclass(frozen=True)
class Prepared:
    """The prepared folder at ``folder``."""

    folder: Path

    @classmethod
    def at(cls, model: str) -> Prepared | None:
        """The folder that ``model`` names, or None if it is anything else."""
        try:
            folder = Path(model).expanduser()
            found = (folder / PLAN).is_file() and (folder / PROVENANCE).is_file()
        except (OSError, RuntimeError, ValueError):  # not a path at all: whoever resolves models says so
            return None
        return cls(folder.absolute()) if found else None

    @property
    def artefacts(self) -> Path:
        return self.folder / ARTEFACTS

    @cached_property
    def plan(self) -> Plan:
        """The plan with its model as an absolute path. Raises `PlanError`, or `ArtefactError` if the model is gone."""
        plan = Plan.read(self.folder / PLAN, loader.technique)
        path = (self.folder / plan.model).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.exists():
            raise ArtefactError(
                f"{self.folder / PLAN} names the model {plan.model!r}, which is not in the folder"
            )
        return replace(plan, model=str(path))

    def extended(self, plan: Plan) -> Plan:
        """The folder's plan with what ``plan`` says besides its model: techniques (in place of those of the same slug),
        a dtype other than ``auto``, engine settings."""
        own = self.plan
        given = {technique.slug for technique in plan.techniques}
        return replace(
            own,
            techniques=(*(t for t in own.techniques if t.slug not in given), *plan.techniques),
            dtype=own.dtype if plan.dtype == "auto" else plan.dtype,
            engine={**own.engine, **plan.engine},
        )

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the folder was made of. Raises `ArtefactError` if it cannot be read."""
        path = self.folder / PROVENANCE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}; prepare the folder again") from None
        if not isinstance(data, dict):
            raise ArtefactError(f"{path} is not an object; prepare the folder again")
        return data

    def calibration(self) -> list[list[int]] | None:
        """The calibration tokens the caller gave, or None for the documentation corpus."""
        path = self.folder / CALIBRATION
        if not path.exists():
            return None
        try:
            stored = load_file(path)
            lengths = stored["lengths"].tolist()
            return [part.tolist() for part in stored["token_ids"].split(lengths)]
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}; prepare the folder again") from None
