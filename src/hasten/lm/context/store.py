"""Contexts whose keys and values are kept: each text is encoded once, as what follows a shared prefix.

A segment is a text's pages in the KV cache. Its tokens stand at the positions that follow the prefix, whatever else a
request reads beside it, so any request with the same prefix can use it, in any order, without rotating anything.

The store owns one reference of every page it keeps, requests own theirs while they live. Least recently used segments
that nobody else refers to are given up when the store is over its bytes or the cache is out of pages. With a folder,
a segment is written to a file when it is encoded and read from there later, also by another process.

Legend: P page size, D head size, G kv heads.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.attention.layout import Extent
from hasten.core.errors import ArtefactError, RequestError, UnsupportedError
from hasten.lm.chunk import Chunk
from hasten.lm.interrupt import deferred_interrupt
from hasten.lm.kvcache.cache import States

if TYPE_CHECKING:
    from hasten.lm.engine import Engine

Key = tuple[
    tuple[int, ...], tuple[int, ...]
]  # tokens of the prefix (empty for a prefix itself) and of the text
_CLOSE = 0.02  # how far states of the same model may lie apart, as a share of their norm


@dataclass(frozen=True)
class Segment:
    """A text's pages. token_ids: its tokens, at positions ``first`` and on; the rest of the last page is empty."""

    token_ids: tuple[int, ...]
    first: int
    pages: tuple[int, ...]


class ContextStore:
    """Segments of one loaded model.

    capacity: most bytes kept, or None for half of the KV cache. folder: where files lie, or None for none.
    identity: of the model and of how its cache stores numbers, for the names of files.
    """

    def __init__(
        self, engine: Engine, capacity: float | None = None, folder: Path | None = None, identity: str = ""
    ) -> None:
        self.engine, self.cache = engine, engine.cache
        self.folder, self.identity = folder, identity
        own = self.cache.bytes() / 2
        self.capacity = own if capacity is None else min(capacity, self.cache.bytes())
        self.segments: OrderedDict[Key, Segment] = OrderedDict()
        self.encoded = self.loaded = 0  # segments computed, and read from files, so far
        self.cache.evictors.append(self.evict)

    # -- asking --------------------------------------------------------------------------------------------------

    @contextmanager
    def states(
        self, prefix: Sequence[int], texts: Sequence[Sequence[int]], follow: bool = True
    ) -> Iterator[States]:
        """What a sequence starts with that reads ``texts`` side by side after ``prefix`` (token ids, none empty).

        follow: the texts are encoded as what follows the prefix; else each alone, from position 0 on (never in files).
        Nothing of it is given up inside the block. Raises `RequestError` if the store or the cache has no room.
        """
        need = self._pages(prefix) + sum(self._pages(ids) for ids in {tuple(ids) for ids in texts})
        if need * self.cache.page_bytes > self.capacity:
            raise RequestError(
                f"the contexts of this request take {need * self.cache.page_bytes / 1e6:.1f} MB, the context store "
                f"holds {self.capacity / 1e6:.1f} MB; raise store_mb or the KV memory, or give fewer contexts"
            )
        pinned: list[int] = []
        try:
            first = self._get(None, tuple(prefix), pinned)
            pages, extents = list(first.pages), [Extent(0, len(prefix), False)]
            for ids in texts:
                segment = self._get(first if follow else None, tuple(ids), pinned)
                extents.append(Extent(len(pages) * self.cache.page_size, len(segment.token_ids), True))
                pages += segment.pages
            yield States(tuple(pages), tuple(extents))
        finally:
            self.cache.pool.release(pinned)

    def bytes(self) -> int:
        """Bytes of the pages that are kept."""
        return sum(len(s.pages) for s in self.segments.values()) * self.cache.page_bytes

    def evict(self, count: int) -> int:
        """Give up segments that nobody uses, least recently used first, until ``count`` pages are free."""
        freed, refs = 0, self.cache.pool.refs
        for key in list(self.segments):
            if freed >= count:
                break
            pages = self.segments[key].pages
            if all(refs[page] == 1 for page in pages):
                self.cache.pool.release(pages)
                del self.segments[key]
                freed += len(pages)
        return freed

    def clear(self) -> None:
        """Give up whatever nobody uses. Files stay."""
        self.evict(self.cache.pool.count)

    # -- making --------------------------------------------------------------------------------------------------

    def _pages(self, ids: Sequence[int]) -> int:
        return -(-len(ids) // self.cache.page_size)

    def _get(self, prefix: Segment | None, ids: tuple[int, ...], pinned: list[int]) -> Segment:
        key = (() if prefix is None else prefix.token_ids, ids)
        segment = self.segments.get(key)
        if segment is None:
            over = self.bytes() + self._pages(ids) * self.cache.page_bytes - self.capacity
            if over > 0:
                self.evict(-int(-over // self.cache.page_bytes))
            path = None if self.folder is None else self._path(self.folder, key)
            if path is not None and prefix is not None and path.exists():
                segment = self._read(path, prefix, ids)
                self.loaded += 1
            else:
                segment = self._encode(prefix, ids)
                self.encoded += 1
                if path is not None and prefix is not None:
                    self._write(path, prefix, segment)
            self.segments[key] = segment
        self.segments.move_to_end(key)
        self.cache.pool.retain(segment.pages)
        pinned += segment.pages
        return segment

    def _encode(self, prefix: Segment | None, ids: tuple[int, ...]) -> Segment:
        cache, runner = self.cache, self.engine.runner
        states = None
        if prefix is not None:
            states = States(prefix.pages, (Extent(0, len(prefix.token_ids), False),))
        first = 0 if prefix is None else len(prefix.token_ids)
        kv = cache.open(self.engine.new_id(), states=states)
        try:
            begin, rows = kv.length, self.engine.settings.max_step_tokens
            if begin + len(ids) > cache.context or not cache.reserve(kv, begin, begin + len(ids)):
                raise self._full(len(ids))
            cache.attach(kv, aside=True)
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                place = range(first + start, first + start + len(part))
                with deferred_interrupt():
                    runner.run([Chunk(kv, begin + start, part, place, 0)])
            if kv.missing is not None:
                raise UnsupportedError(
                    "contexts cannot be kept where a layer hook drops rows or skips attention; remove the layer hook"
                )
            pages = tuple(kv.pages[begin // cache.page_size :])
            cache.pool.retain(pages)
        finally:
            cache.close(kv)
            runner.forget(kv.id)
        return Segment(ids, first, pages)

    def _full(self, tokens: int) -> RequestError:
        return RequestError(
            f"no KV pages are free for a context of {tokens} tokens: raise kv_memory_mb, or wait for running requests"
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def _path(self, folder: Path, key: Key) -> Path:
        text = json.dumps([self.identity, self.cache.page_size, self.cache.layers, *map(list, key)])
        return folder / f"context-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _content(self, segment: Segment) -> dict[str, Tensor]:
        """By layer, the pages of a segment [pages, 2, G, P, D]; slots that hold no token are zero."""
        by_page = [self.cache.format.read_page(page) for page in segment.pages]
        used = len(segment.token_ids) - (len(segment.pages) - 1) * self.cache.page_size
        out = {}
        for layer in range(len(by_page[0])):
            content = torch.stack([page[layer] for page in by_page])
            content[-1, ..., used:, :] = 0
            out[f"layer.{layer}"] = content
        return out

    def _mark(self, prefix: Segment) -> Tensor:
        """Values of the prefix's last token in the last layer: other weights give others."""
        last = len(prefix.token_ids) - 1
        content = self.cache.format.read_page(prefix.pages[last // self.cache.page_size])[-1]
        return content[1, :, last % self.cache.page_size].contiguous()

    def _write(self, path: Path, prefix: Segment, segment: Segment) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".context-")
            os.close(handle)
            try:
                save_file({**self._content(segment), "prefix": self._mark(prefix)}, name)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise ArtefactError(f"{path} cannot be written: {error.strerror or error}") from None

    def _read(self, path: Path, prefix: Segment, ids: tuple[int, ...]) -> Segment:
        cache = self.cache
        try:
            with safe_open(path, "pt") as file:
                content = [file.get_tensor(f"layer.{layer}") for layer in range(cache.layers)]
                mark = file.get_tensor("prefix")
        except (SafetensorError, OSError, KeyError) as error:
            raise ArtefactError(f"{path} is not a readable context ({error}); delete it") from None
        ours = self._mark(prefix)
        if mark.shape != ours.shape or mark.dtype != ours.dtype:
            raise ArtefactError(f"{path} was made for another model; delete it or choose another folder")
        apart = float((mark.float() - ours.float()).norm() / ours.float().norm().clamp_min(1e-9))
        if not apart <= _CLOSE:
            raise ArtefactError(
                f"{path} was made with other weights (states {apart:.0%} apart); delete it or choose another folder"
            )
        count = self._pages(ids)
        if any(len(layer) != count for layer in content):
            raise ArtefactError(f"{path} holds {len(content[0])} pages, not {count}; delete it")
        kv = cache.open(self.engine.new_id())
        try:
            if not cache.reserve(kv, 0, len(ids)):
                raise self._full(len(ids))
            for number, page in enumerate(kv.pages):
                cache.format.write_page(page, [layer[number] for layer in content])
            pages = tuple(kv.pages)
            cache.pool.retain(pages)
        finally:
            cache.close(kv)
        return Segment(ids, len(prefix.token_ids), pages)
