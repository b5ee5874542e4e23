"""Weights that live partly on disk: tiers of layers, and a streamer that brings the next ones while one computes.

Layers fill the tiers in order: *resident* (expanded, in memory), then *compressed* (as on disk, in memory), then
*disk*. Those that are not resident pass through two buffers, layer after layer, again and again for every step: one
thread reads, one expands, and the caller computes. Source: Endor (arXiv 2406.11674).
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from hasten.core.errors import SettingError
from hasten.kernels.dense import dense
from hasten.kernels.endor import expand
from hasten.kernels.packed import Packed
from hasten.weights.layer_file import LayerFile, Region, Stored, buffer, view_bitmap, view_dense

_SLOTS = 2


@dataclass(frozen=True)
class _Ready:
    """A layer in a buffer, or why it is not."""

    layer: int
    slot: int
    error: BaseException | None = None


class WeightStore:
    """The layers of a `LayerFile` within a memory budget.

    budget: bytes for the resident and the compressed tier together; two layers' buffers come on top (each an expanded
    layer, and with bitmaps a compressed one). prefetch: false reads and expands a layer when it is asked for.
    One caller at a time, layers in ascending order (others cost the reading of those between).
    """

    def __init__(self, file: LayerFile, budget: int, *, compressed: int = 0, prefetch: bool = True) -> None:
        if budget < 0 or compressed < 0 or compressed > budget:
            raise SettingError(
                f"memory budget of {budget} bytes, {compressed} of them for compressed layers: "
                "neither may be negative, nor the second above the first"
            )
        self.file, self.budget, self.prefetch = file, budget, prefetch
        self.bitmaps = any(s.kept is not None for r in file.regions for s in r.linears.values())
        self._resident: dict[int, Tensor] = {}
        self._held: dict[int, Tensor] = {}  # the compressed tier
        order = list(range(len(file.regions)))
        room = budget - compressed
        while order and _dense_size(file.regions[order[0]]) <= room:
            layer = order.pop(0)
            room -= _dense_size(file.regions[layer])
            raw = self._raw_buffer(layer)
            file.read(layer, raw)
            self._resident[layer] = raw if not self.bitmaps else _expanded(file.regions[layer], raw, None)
        room = compressed if self.bitmaps else 0
        self.streamed = tuple(order)
        for layer in order:
            if file.regions[layer].size > room:
                break
            room -= file.regions[layer].size
            self._held[layer] = self._raw_buffer(layer)
            file.read(layer, self._held[layer])
        self._handles: dict[tuple[int, str, int], Packed] = {}
        self._dense: list[Tensor] = []
        self._raw: list[Tensor] = []
        self._streamer: LayerStreamer | None = None
        if order:
            regions = [file.regions[layer] for layer in order]
            size = max(r.size if not self.bitmaps else _dense_size(r) for r in regions)
            self._dense = [buffer(size) for _ in range(_SLOTS)]
            if self.bitmaps and len(self._held) < len(order):
                self._raw = [buffer(max(r.size for r in regions)) for _ in range(_SLOTS)]
            self._streamer = LayerStreamer(file, order, self._dense, self._raw, self._held, prefetch)
            weakref.finalize(self, self._streamer.stop)
        file.bytes_read = 0

    def _raw_buffer(self, layer: int) -> Tensor:
        return buffer(self.file.regions[layer].size)

    def linear(self, layer: int, name: str, outputs: int, bias_P: Tensor | None) -> Packed:
        """The kernel of a linear, its weights in memory until a linear of another layer is asked for."""
        slot = -1
        if layer not in self._resident:
            assert self._streamer is not None
            slot = self._streamer.acquire(layer)
        found = self._handles.get((layer, name, slot))
        if found is None:
            region = self.file.regions[layer]
            raw = self._resident[layer] if slot < 0 else self._dense[slot]
            at = region.linears[name].at if not self.bitmaps else _places(region)[name]
            packed = view_dense(raw, region.linears[name], at)
            found = self._handles[layer, name, slot] = dense(packed, outputs, bias_P)
        return found

    def weight(self, layer: int, name: str, outputs: int) -> Tensor:
        """A copy of a linear's weight, [O, I] in its dtype, read apart from the stream."""
        region = self.file.regions[layer]
        raw = self._raw_buffer(layer)
        LayerFile.read(self.file, layer, raw)
        self.file.bytes_read -= region.size
        stored = region.linears[name]
        packed = view_dense(raw, stored, stored.at) if not self.bitmaps else expand(view_bitmap(raw, stored))
        return packed.transpose(1, 2).reshape(-1, stored.shape[1])[:outputs].clone()

    def memory(self) -> dict[str, int]:
        """Bytes: of the resident tier, the compressed one, and the buffers that layers pass through."""
        return {
            "resident": sum(t.nbytes for t in self._resident.values()),
            "compressed": sum(t.nbytes for t in self._held.values()),
            "buffers": sum(t.nbytes for t in (*self._dense, *self._raw)),
        }

    def streamed_bytes(self) -> int:
        """Bytes read from disk per pass through all layers."""
        return sum(self.file.regions[i].size for i in self.streamed if i not in self._held)

    def close(self) -> None:
        """Stop reading."""
        if self._streamer is not None:
            self._streamer.stop()


class LayerStreamer:
    """Brings layers ``order``, over and over, into two buffers: read(l + 2) beside expand(l + 1) beside compute(l).

    raw: staging of compressed layers, empty when layers are read as they are used. held: compressed layers that need
    no reading.
    """

    def __init__(
        self,
        file: LayerFile,
        order: Sequence[int],
        dense_slots: Sequence[Tensor],
        raw_slots: Sequence[Tensor],
        held: dict[int, Tensor],
        prefetch: bool,
    ) -> None:
        self.file, self.order, self.held = file, tuple(order), held
        self.dense_slots, self.raw_slots = dense_slots, raw_slots
        self.bitmaps = any(s.kept is not None for r in file.regions for s in r.linears.values())
        self._current: _Ready | None = None
        self._stopping = threading.Event()
        self._free_dense: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._free_raw: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Ready] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._free_dense.put(slot)
            self._free_raw.put(slot)
        self._threads: list[threading.Thread] = []
        self.prefetch = prefetch

    def acquire(self, layer: int) -> int:
        """The buffer that holds ``layer``; valid until another layer is asked for. Raises what reading raised."""
        if self._current is not None and self._current.layer == layer:
            return self._current.slot
        if not self.prefetch:
            self._bring(layer, 0)
            self._current = _Ready(layer, 0)
            return 0
        if not self._threads:
            self._start()
        if self._current is not None:
            self._free_dense.put(self._current.slot)
            self._current = None
        while True:
            found = self._ready.get()
            if found.error is not None:
                self._ready.put(found)  # for whoever asks next
                raise found.error
            if found.layer == layer:
                self._current = found
                return found.slot
            self._free_dense.put(found.slot)

    def _bring(self, layer: int, slot: int) -> None:
        to, held = self.dense_slots[slot], self.held.get(layer)
        if not self.bitmaps:
            self.file.read(layer, to)
            return
        if held is None:
            self.file.read(layer, self.raw_slots[0])
            held = self.raw_slots[0]
        _expanded(self.file.regions[layer], held, to)

    def _start(self) -> None:
        targets = [self._reading] + ([self._expanding] if self.bitmaps else [])
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads and wait for them."""
        self._stopping.set()
        for _ in range(_SLOTS):
            self._free_dense.put(-1)
            self._free_raw.put(-1)
        self._read.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []

    def _reading(self) -> None:
        try:
            for step in count():
                layer = self.order[step % len(self.order)]
                if self.bitmaps and layer in self.held:
                    self._read.put((layer, -1))
                    if step % len(self.order) == len(self.order) - 1 and len(self.held) == len(self.order):
                        self._pause()  # nothing to read: do not run ahead without bound
                    if self._stopping.is_set():
                        return
                    continue
                slot = (self._free_raw if self.bitmaps else self._free_dense).get()
                if self._stopping.is_set():
                    return
                self.file.read(layer, (self.raw_slots if self.bitmaps else self.dense_slots)[slot])
                if self.bitmaps:
                    self._read.put((layer, slot))
                else:
                    self._ready.put(_Ready(layer, slot))
        except BaseException as error:
            self._ready.put(_Ready(-1, -1, error))

    def _pause(self) -> None:
        while not self._stopping.is_set() and self._read.qsize() >= len(self.order):
            self._stopping.wait(0.001)

    def _expanding(self) -> None:
        try:
            while True:
                item = self._read.get()
                slot = self._free_dense.get() if item is not None else -1
                if item is None or self._stopping.is_set():
                    return
                layer, raw_slot = item
                raw = self.held[layer] if raw_slot < 0 else self.raw_slots[raw_slot]
                _expanded(self.file.regions[layer], raw, self.dense_slots[slot])
                if raw_slot >= 0:
                    self._free_raw.put(raw_slot)
                self._ready.put(_Ready(layer, slot))
        except BaseException as error:
            self._ready.put(_Ready(-1, -1, error))


def _places(region: Region) -> dict[str, int]:
    """Where each linear of an expanded layer begins."""
    at, places = 0, {}
    for name, stored in region.linears.items():
        places[name] = at
        at += -(-stored.dense_bytes // 64) * 64
    return places


def _dense_size(region: Region) -> int:
    return region.dense_bytes


def _expanded(region: Region, raw: Tensor, to: Tensor | None) -> Tensor:
    """A layer's linears expanded one after the other into ``to``, or into memory of their own."""
    to = buffer(_dense_size(region)) if to is None else to
    for name, at in _places(region).items():
        stored: Stored = region.linears[name]
        # One thread: the others compute.
        expand(view_bitmap(raw, stored), view_dense(to, stored, at), parallel=False)
    return to
