"""Real inputs for workloads, made from the documentation corpus of `hasten.core.corpus`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.core.corpus import SPLITS, Corpus, Document, Split, corpus
from hasten.core.errors import RequestError

__all__ = ["SPLITS", "Corpus", "Document", "Section", "Split", "corpus", "prompts", "sections"]

_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_MIN_CHARACTERS, _MAX_CHARACTERS = 160, 1600

# What people ask about a passage of a manual. Every task needs the passage, so none can be answered by rote.
_TASKS = (
    'I am reading "{heading}" in the {title} documentation. It says:\n\n{passage}\n\n'
    "What does this mean in practice? Give an example.",
    "Summarize this passage of the {title} documentation in one sentence.\n\n{passage}",
    "Explain the following to somebody who is new to {title}.\n\n{passage}",
    "Write three questions that a reader of this passage should be able to answer, with their answers.\n\n{passage}",
    'Rewrite this passage about "{heading}" as a short list of steps or facts.\n\n{passage}',
)


@dataclass(frozen=True)
class Section:
    """A heading of a document with the first paragraph of prose under it (on one line)."""

    document: str
    title: str
    heading: str
    passage: str


def sections(document: Document) -> Iterator[Section]:
    """The sections of ``document`` that open with a paragraph of 160 to 1600 characters of prose."""
    headings = list(_HEADING.finditer(document.text))
    title = headings[0].group(1) if headings else document.name
    for number, found in enumerate(headings):
        after = headings[number + 1].start() if number + 1 < len(headings) else None
        body = document.text[found.end() : after]
        passage = next((part for part in body.split("\n\n") if part.strip()), "").strip("\n")
        if passage[:1].isupper() and _MIN_CHARACTERS <= len(passage) <= _MAX_CHARACTERS:
            yield Section(document.name, title, found.group(1), " ".join(passage.split()))


def prompts(split: Split, count: int, seed: int = 0) -> list[str]:
    """``count`` different requests about passages of ``split``; the same for the same arguments everywhere.

    Raises `RequestError` when ``count`` is negative or the split has fewer passages.
    """
    found = [section for document in corpus().documents(split) for section in sections(document)]
    if not 0 <= count <= len(found):
        raise RequestError(f"split {split!r} gives 0 to {len(found)} prompts, not {count}")
    # Hashes instead of `random`, whose algorithms may change between Python releases.
    ranked = sorted((_digest(seed, section), number) for number, section in enumerate(found))
    return [_request(found[number], digest) for digest, number in ranked[:count]]


def _request(section: Section, digest: bytes) -> str:
    task = _TASKS[digest[-1] % len(_TASKS)]
    return task.format(title=section.title, heading=section.heading, passage=section.passage)


def _digest(seed: int, section: Section) -> bytes:
    return hashlib.sha256(
        f"{seed}\n{section.document}\n{section.heading}\n{section.passage}".encode()
    ).digest()
