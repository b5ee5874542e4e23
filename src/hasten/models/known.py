"""The models hasten knows by name (`known.toml`): where their bytes come from and under which licence.

Most are fetched (`Asset`); a few are trained on this machine (`Recipe`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Protocol

from hasten.core.fetch import Asset, Member

DEFAULT_MODEL = "smollm2-135m-instruct"


class Train(Protocol):
    """Trains a model into the folder ``target``, which appears at once when all is done.

    Unfinished work lies in the folder ``target`` + ``.partial``, and a later call goes on from there. The caller holds
    the lock, and removes that folder in the end.
    """

    def __call__(self, target: Path, quiet: bool = False) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """A model that is trained here. ``train``: the import path (``module:function``) of a `Train`; ``size``: bytes of
    its ``model.safetensors``."""

    name: str
    train: str
    size: int

    def load(self) -> Train:
        """The function; only now is its module imported."""
        module, _, function = self.train.partition(":")
        found: Train = getattr(import_module(module), function)
        return found


@dataclass(frozen=True)
class KnownModel:
    """A model of the list. ``file``: its file or folder. ``opt_in`` is empty, or the reason why it is only pulled by
    explicit request."""

    name: str
    title: str
    file: str
    license: str
    opt_in: str
    asset: Asset | Recipe


@cache
def known_models() -> dict[str, KnownModel]:
    """All known models by name, in the order of `known.toml`."""
    text = resources.files("hasten.models").joinpath("known.toml").read_text(encoding="utf-8")
    return {name: _known(name, table) for name, table in tomllib.loads(text).items()}


def _known(name: str, table: dict[str, object]) -> KnownModel:
    return KnownModel(
        name=name,
        title=str(table["title"]),
        file=str(table["file"]),
        license=str(table["license"]),
        opt_in=str(table.get("opt_in", "")),
        asset=_recipe(name, table) if "train" in table else _asset(name, table),
    )


def _recipe(name: str, table: dict[str, object]) -> Recipe:
    return Recipe(name, str(table["train"]), int(str(table["size"])))


def _asset(name: str, table: dict[str, object]) -> Asset:
    package, member = str(table["package"]), str(table["member"])
    members = tuple(
        Member(package.format(n=index + 1, index=index), member.format(n=index + 1, index=index))
        for index in range(int(str(table.get("parts", 1))))
    )
    return Asset(name, members, size=int(str(table["size"])), sha256=str(table["sha256"]))
