"""Prompts made of documents, and stores without an engine, for tests of `ragcache`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hasten.lm.context.transform import Prompt
from hasten.lm.kvcache.format import KVFormat, PlainKV
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.ragcache import KnowledgeStore, RagCache
from hasten.models.checkpoint import open_checkpoint
from hasten.models.config import HeadShape
from hasten.models.context import BuildContext

SIZE = 4  # tokens of a page


def documents(count: int, low: int = 10, high: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(low, high, count)]


def prompt(*parts: list[int], question: list[int]) -> Prompt:
    """The parts, each a document, and what only this request asks."""
    ids, ends = [], []
    for part in parts:
        ids += part
        ends.append(len(ids))
    return Prompt(token_ids=tuple(ids + question), segments=tuple(ends))


def context(model: Path, root: Path) -> BuildContext:
    return BuildContext.of(open_checkpoint(model), root)


def store(
    given: BuildContext, pages: int, format: KVFormat | None = None, **settings: object
) -> tuple[KnowledgeStore, PagePool]:
    """A bound store; ``host_pages`` instead of ``host_mb``: pages of one layer, two numbers per token and side."""
    format = format or PlainKV()
    if "host_pages" in settings:
        settings["host_mb"] = int(settings.pop("host_pages")) * 64 / 1e6  # type: ignore[call-overload]
    made = RagCache(**settings).provide("prefix_store", given)
    assert isinstance(made, KnowledgeStore)
    pool = PagePool(pages)
    format.allocate(1, pages, SIZE, HeadShape(1, 1, 2))
    made.bind(pool, format, SIZE)
    return made, pool


def check(made: KnowledgeStore, pool: PagePool) -> None:
    """What always holds: tiers along every path, accounts of pages and slots, at most one copy out."""
    held: list[int] = []
    slots: list[int] = []
    count = 0
    for node in made.tree.nodes():
        count += 1
        assert node.pages or node.slots, "a node is somewhere"
        parent = node.parent
        assert parent is not None
        if parent is not made.tree.root and node.pages:
            assert parent.pages, "a document is in the pool, the one before it is not"
        assert node.fast_children == sum(bool(child.pages) for child in node.children.values())
        assert node.swaps <= 1
        assert bool(node.slots) == bool(node.swaps)
        assert node.pins == 0
        for own in (node.pages, node.slots):
            assert len(own) in (0, len(node.key) // SIZE)
        held += node.pages
        slots += node.slots
    assert count == made.tree.count
    assert len(held) == len(set(held)) == len(made)
    assert all(pool.refs[page] >= 1 for page in held)
    if made.host is not None:
        assert len(slots) == len(set(slots)) == made.host.capacity - made.host.free
