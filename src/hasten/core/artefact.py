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
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.core.errors import ArtefactError


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits over a JSON-able description (model hash, settings, data hash, version)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ArtefactStore:
    """Artefacts of one model under ``root``. Safe for concurrent builders: the first rename wins."""

    def __init__(self, root: Path, model: str) -> None:
        self.root = Path(root)
        self.model = model  # fingerprint of the model the artefacts belong to

    def path(self, slug: str, made_from: Mapping[str, Any]) -> Path:
        return self.root / f"{slug}-{fingerprint({'model': self.model, 'slug': slug, **made_from})}"

    def find(self, slug: str, made_from: Mapping[str, Any]) -> Path | None:
        """The folder of a finished artefact, or None. Raises `ArtefactError` if it is damaged."""
        folder = self.path(slug, made_from)
        if not folder.is_dir():
            return None
        self._verify(folder, slug, made_from)
        return folder

    def build(self, slug: str, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """Return the artefact, calling ``write(folder)`` to make it if it does not exist yet."""
        found = self.find(slug, made_from)
        if found is not None:
            return found
        target = self.path(slug, made_from)
        self.root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{slug}-", dir=self.root))
        try:
            write(building)
            files = {p.name: _sha256(p) for p in sorted(building.iterdir()) if p.is_file()}
            record = {"slug": slug, "model": self.model, "made_from": dict(made_from), "files": files}
            (building / "artefact.json").write_text(json.dumps(record, indent=1, default=str))
            try:
                os.rename(building, target)
            except OSError:
                # Somebody finished the same artefact first; theirs has the same fingerprint.
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target

    def _verify(self, folder: Path, slug: str, made_from: Mapping[str, Any]) -> None:
        try:
            record = json.loads((folder / "artefact.json").read_text())
            files, model = record["files"], record["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder} is not a readable {slug} artefact ({error}); delete it") from None
        if model != self.model:
            raise ArtefactError(f"{folder} was made for model {model}, not {self.model}; delete it")
        for name, digest in files.items():
            path = folder / name
            if not path.is_file() or _sha256(path) != digest:
                raise ArtefactError(f"{path} is missing or damaged; delete {folder} and prepare it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
