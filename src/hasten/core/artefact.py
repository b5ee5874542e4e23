"""Artefacts: what a technique computes or trains once, kept as fingerprinted files beside the model.

An artefact is a folder ``<root>/<slug>-<fingerprint>/`` with ``artefact.json`` (what it was made from) and
whatever files the technique wrote (safetensors, never pickle). It appears atomically: it is built in a
temporary folder and renamed, so a killed build leaves nothing that could be mistaken for a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from hasten.core.errors import ArtefactError


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits over a description (model hash, settings, data hash, version), the same in every process.

    Values are what JSON can hold, sets, and objects whose text names their value (paths, dtypes). Raises
    `ArtefactError` for an object whose text is its address.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    text = str(value)
    if f"0x{id(value):x}" in text:
        raise ArtefactError(f"{text} cannot be part of a fingerprint: it says where it lies, not what it is")
    return text


class ArtefactStore:
    """Artefacts of one model under ``root``. Safe for concurrent builders: the first rename wins.

    sealed: hold what is there and make nothing new (a prepared folder). used: the folders asked for so far; made: those
    of them that did not exist.
    """

    def __init__(self, root: Path, model: str, *, sealed: bool = False) -> None:
        self.root = Path(root)
        self.model = model  # fingerprint of the model the artefacts belong to
        self.sealed = sealed
        self.used: set[Path] = set()
        self.made: set[Path] = set()

    def of_model(self, model: str) -> ArtefactStore:
        """The artefacts of another model (what surgery made of this one) in the same place."""
        other = ArtefactStore(self.root, model, sealed=self.sealed)
        other.used, other.made = self.used, self.made
        return other

    def path(self, slug: str, made_from: Mapping[str, Any]) -> Path:
        return self.root / f"{slug}-{fingerprint({'model': self.model, 'slug': slug, **made_from})}"

    def find(self, slug: str, made_from: Mapping[str, Any]) -> Path | None:
        """The folder of a finished artefact, or None. Raises `ArtefactError` if it is damaged, or missing where the
        store is sealed."""
        folder = self.path(slug, made_from)
        if not folder.is_dir():
            if self.sealed:
                raise ArtefactError(
                    f"{self.root.parent} was not prepared for this use of {slug}: its settings, the calibration "
                    "data or the version of hasten differ; run `hasten prepare` with them"
                )
            return None
        self._verify(folder, slug)
        self.used.add(folder)
        return folder

    def build(self, slug: str, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """Return the artefact, calling ``write(folder)`` to make it if it does not exist yet."""
        found = self.find(slug, made_from)
        if found is not None:
            return found
        target = self.path(slug, made_from)
        self.root.mkdir(parents=True, exist_ok=True)
        # Named after the builder, so that the folder of a killed one is known to be nobody's.
        mine = f".{slug}-building-{socket.gethostname()}-"
        self._remove_abandoned(mine)
        building = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=self.root))
        try:
            write(building)
            files = {
                path.relative_to(building).as_posix(): _sha256(path)
                for path in sorted(building.rglob("*"))
                if path.is_file()
            }
            record = {"slug": slug, "model": self.model, "made_from": dict(made_from), "files": files}
            (building / "artefact.json").write_text(
                json.dumps(record, indent=1, default=_plain), encoding="utf-8"
            )
            try:
                os.rename(building, target)
            except OSError:
                # Somebody finished the same artefact first; theirs has the same fingerprint.
                if not target.is_dir():
                    raise
                self._verify(target, slug)
            self.used.add(target)
            self.made.add(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target

    def _remove_abandoned(self, prefix: str) -> None:
        """Delete what builders of this machine left that are no longer running."""
        for folder in self.root.glob(prefix + "*"):
            pid = folder.name.removeprefix(prefix).partition("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)

    def _verify(self, folder: Path, slug: str) -> None:
        try:
            record = json.loads((folder / "artefact.json").read_text(encoding="utf-8"))
            files, model = dict(record["files"]), record["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{folder} is not a readable {slug} artefact ({type(error).__name__}: {error}); delete it"
            ) from None
        if model != self.model:
            raise ArtefactError(f"{folder} was made for model {model}, not {self.model}; delete it")
        for name, digest in files.items():
            path = folder / name
            if not path.is_file() or _sha256(path) != digest:
                raise ArtefactError(f"{path} is missing or damaged; delete {folder} and prepare it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
