"""QuantSpec's KV pages: two 4-bit planes of one store, and full-precision buffers for the newest tokens.

Source: Tiwari et al., "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache", ICML 2025, arXiv
2502.10424, section 4. The draft reads the upper plane (4 bits), the target both (8 bits).

A page is a group of P tokens, quantised once, when P newer tokens exist: keys per channel over the page, values per
token. So page size and group size are the same: a page holds its own scales, two sequences that share a page share a
whole group, and a group that is still growing has one owner (`KVCache.reserve` copies a shared page before it is
written).

The paper's buffers F1 and F2 are a ring of 2 P tokens per sequence, and room for the block in flight. A token at
position p reads from the planes the pages before ``(p + 1) // P - 1`` and the rest, between P and 2 P - 1 tokens, in
full precision, whether it is decoded, verified or part of a prompt: what a row reads depends on its position alone,
not on how a prompt was cut, which guesses were rejected or whether the sequence lost its pages in between. Rejected
tokens are overwritten in the ring; planes are never written for tokens that may still be rejected.

Shared between sequences: quantised pages. Never shared: the ring. A fork gets a copy; a sequence that starts with
stored pages reads them from the planes, and computes at least P tokens of its own, so that decoding has its newest P
in full precision.

Legend: L layers, N pages, G kv heads, P page size, D head size, T rows of the step, S sequences, R tokens of a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense, Selection
from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.quantspec import LANES, Planes, Tails, quantspec_attend, quantspec_pack
from hasten.kernels.rope import rope_append
from hasten.lm.kvcache.format import KVFormat


@dataclass(eq=False)
class Ring:
    """A sequence's full-precision tokens. Token t lies at ``t % R`` of ``data_2LRGD`` (keys, then values).

    floor: pages that the sequence took over quantised. done: pages quantised so far. top: tokens written so far.
    """

    data_2LRGD: Tensor
    floor: int
    done: int
    top: int
    layers: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        data = self.data_2LRGD
        self.layers = [(data[0, i], data[1, i]) for i in range(data.shape[1])]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the tokens of one sequence go in a step: rows ``[row, row + count)`` are tokens from ``start`` on.

    low: first token of the full-precision part. long: the rows do not fit beside what they read, so they are read from
    a copy that holds both. pack: pages [done before the step, done after).
    """

    ring: Ring
    row: int
    count: int
    start: int
    low: int
    long: bool
    pack: range
    pages: Tensor
    slot_C: Tensor  # of the new tokens in the ring


@dataclass(frozen=True, eq=False)
class Step:
    """What all layers of a step share."""

    layout: StepLayout
    places: tuple[Place, ...]
    position_S: Tensor
    bound_T: Tensor
    table_SM: Tensor


@dataclass(frozen=True, eq=False)
class QuantSpecPages:
    """One layer, for `QuantSpecKernel`: the planes and this step's tails."""

    planes: Planes
    tails: Tails


class QuantSpecKV(KVFormat):
    """Planes of 4 + 4 bits and rings. ``group``: P; ``lead``: tokens in flight that a ring has room for beside 2 P."""

    def __init__(self, group: int, lead: int, dtype: torch.dtype) -> None:
        self.page_size: int = group
        self.lead = lead
        self.dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
        self.planes: list[Planes] = []
        self.rings: dict[int, Ring] = {}
        self.rotations = 0  # pages quantised so far, counted once for all layers
        self._tails: list[Tails | None] = []
        self._step: Step | None = None
        self._spare: list[Tensor] = []

    # -- storage -------------------------------------------------------------------------------------------------

    def allocate(self, layers: int, pages: int, page_size: int, shape: HeadShape) -> None:
        if page_size != self.page_size:
            raise SettingError(
                f"quantspec: a page is a group, so page_size = {page_size} must equal group = {self.page_size}"
            )
        self.shape = shape
        self.planes = [Planes.empty(pages, shape.kv_heads, page_size, shape.size) for _ in range(layers)]
        self._tails = [None] * layers

    def page_bytes(self, layers: int, page_size: int, shape: HeadShape) -> int:
        keys, values = -(-page_size // LANES) * LANES * shape.size, page_size * shape.size
        return layers * shape.kv_heads * (keys + values + 4 * (page_size + shape.size))

    def draft_bytes(self, layers: int, page_size: int, shape: HeadShape) -> int:
        """Bytes of a page that the draft reads: the upper plane, scales and zeros."""
        numbers = 4 * (page_size + shape.size)
        both = self.page_bytes(layers, page_size, shape) // (layers * shape.kv_heads) - numbers
        return layers * shape.kv_heads * (both // 2 + numbers)

    @property
    def capacity(self) -> int:
        """Tokens of a ring."""
        return 2 * self.page_size + self.lead

    def ring_bytes(self) -> int:
        """Bytes of the rings in use. They come beside the pages: as many as there are running sequences."""
        return sum(ring.data_2LRGD.nbytes for ring in self.rings.values())

    def copy_page(self, source: int, target: int) -> None:
        for planes in self.planes:
            for x in planes.tensors:
                x[target] = x[source]

    def read_page(self, page: int) -> list[Tensor]:
        raise UnsupportedError(
            "quantspec pages cannot be moved out of the cache: their newest tokens lie elsewhere"
        )

    def kernel(self) -> QuantSpecKernel:
        return QuantSpecKernel(self, full=True)

    # -- sequences -----------------------------------------------------------------------------------------------

    def shareable(self, length: int, page_size: int) -> int:
        return self._whole(length) * page_size

    def forked(self, source: int, target: int) -> None:
        ring = self.rings.get(source)
        if ring is not None:
            data = self._data()
            data.copy_(ring.data_2LRGD)
            self.rings[target] = Ring(data, ring.floor, ring.done, ring.top)

    def renamed(self, old: int, new: int) -> None:
        if old in self.rings:
            self.rings[new] = self.rings.pop(old)

    def forget(self, sequence_id: int) -> None:
        ring = self.rings.pop(sequence_id, None)
        if ring is not None:
            self._spare.append(ring.data_2LRGD)

    def _data(self) -> Tensor:
        if self._spare:
            return self._spare.pop()
        size = (2, len(self.planes), self.capacity, self.shape.kv_heads, self.shape.size)
        with torch.inference_mode(False):  # a fork copies it outside of a step
            return torch.empty(size, dtype=self.dtype)

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self, layout: StepLayout) -> Step:
        """The plan of a step, made when its first layer asks."""
        if self._step is None or self._step.layout is not layout:
            if layout.layers or layout.trees:
                raise UnsupportedError(
                    "quantspec pages hold the same tokens in all layers, in one chain: no layer hook may "
                    "drop rows and no "
                    "drafter propose trees"
                )
            start = layout.query_start_S1.tolist()
            lengths = layout.kv_len_S.tolist()
            table_SM = layout.page_table_SM.contiguous()
            places, bounds = [], []
            for s, (sequence, length) in enumerate(zip(layout.sequence_ids, lengths, strict=True)):
                place = self._place(sequence, start[s], start[s + 1] - start[s], length, table_SM[s])
                places.append(place)
                rows = torch.arange(place.start, length)
                bounds.append(((rows + 1) // self.page_size - 1).clamp_min(place.ring.floor))
            self._step = Step(
                layout,
                tuple(places),
                torch.tensor([place.start for place in places], dtype=torch.int64),
                torch.cat(bounds).int() if bounds else torch.empty(0, dtype=torch.int32),
                table_SM,
            )
        return self._step

    def _place(self, sequence: int, row: int, count: int, length: int, pages: Tensor) -> Place:
        size, start = self.page_size, length - count
        ring = self.rings.get(sequence)
        if ring is None:
            if start % size:
                raise UnsupportedError(
                    f"sequence {sequence} goes on at token {start}, but its full-precision tokens are "
                    f"gone; a quantspec "
                    f"sequence starts at a multiple of {size} or is forked from a running one"
                )
            ring = self.rings[sequence] = Ring(self._data(), start // size, start // size, start)
        first = max(self._whole(start + 1), ring.floor)
        low = first * size
        if start > ring.top or low < ring.top - self.capacity or start < ring.floor * size:
            raise UnsupportedError(
                f"sequence {sequence} cannot be cut to {start} tokens: its older tokens are quantised "
                f"(it had {ring.top}; quantised pages are never undone)"
            )
        done = min(ring.done, start // size)
        after = max(self._whole(length), ring.floor, done)
        long = count > self.lead
        if long:
            low = min(low, done * size)
        ring.done = after
        ring.top = length if count >= self.capacity else max(ring.top, length)
        self.rotations += after - done
        slot_C = torch.arange(max(start, length - self.capacity), length) % self.capacity
        return Place(ring, row, count, start, low, long, range(done, after), pages[done:after].long(), slot_C)

    def _whole(self, tokens: int) -> int:
        """Pages that are read from the planes when ``tokens`` exist."""
        return max(0, tokens // self.page_size - 1)

    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, layout: StepLayout) -> None:
        def write(rows: slice, slot_C: Tensor, keys_RGD: Tensor, values_RGD: Tensor) -> None:
            keys_RGD[slot_C] = k_TGD[rows].to(self.dtype)
            values_RGD[slot_C] = v_TGD[rows].to(self.dtype)

        self._append(layer, layout, write)

    def rotate_append(
        self,
        layer: int,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        layout: StepLayout,
    ) -> tuple[Tensor, Tensor]:
        def write(rows: slice, slot_C: Tensor, keys_RGD: Tensor, values_RGD: Tensor) -> None:
            rope_append(  # to it, a token of a ring is a page
                q_THD[rows],
                k_TGD[rows],
                v_TGD[rows],
                cos_TR[rows],
                sin_TR[rows],
                slot_C,
                keys_RGD.unsqueeze(2),
                values_RGD.unsqueeze(2),
            )

        self._append(layer, layout, write)
        return q_THD, k_TGD

    def _append(
        self, layer: int, layout: StepLayout, write: Callable[[slice, Tensor, Tensor, Tensor], None]
    ) -> None:
        """``write(rows, slots, keys, values)`` puts rows of the step into full-precision tokens."""
        step = self.step(layout)
        held = []
        for place in step.places:
            rows = slice(place.row, place.row + place.count)
            keys_RGD, values_RGD = place.ring.layers[layer]
            if place.long:
                old = torch.arange(place.low, place.start)
                new = torch.arange(place.start, place.start + place.count) - place.low
                both = []
                for x_RGD in (keys_RGD, values_RGD):
                    both.append(x_RGD.new_empty(len(old) + place.count, *x_RGD.shape[1:]))
                    both[-1][: len(old)] = x_RGD[old % self.capacity]
                write(rows, new, both[0], both[1])
                count = len(place.slot_C)
                keys_RGD[place.slot_C], values_RGD[place.slot_C] = both[0][-count:], both[1][-count:]
                held.append((both[0], both[1], place.low))
            else:
                write(rows, place.slot_C, keys_RGD, values_RGD)
                held.append((keys_RGD, values_RGD, 0))
            if place.pack:
                self._pack(layer, place, *held[-1])
        last = self._tails[layer]
        # While the same sequences decode, their rings stay where they are.
        if (
            last is None
            or len(last.keys) != len(held)
            or any(
                k is not kept or base != old
                for (k, _, base), kept, old in zip(held, last.keys, last.base, strict=True)
            )
        ):
            keys, values, bases = zip(*held, strict=True) if held else ((), (), ())
            self._tails[layer] = Tails(keys, values, bases)

    def _pack(self, layer: int, place: Place, keys_RGD: Tensor, values_RGD: Tensor, base: int) -> None:
        token = torch.arange(place.pack.start * self.page_size, place.pack.stop * self.page_size)
        at = (token - base) % len(keys_RGD)
        shape = (len(place.pack), self.page_size, *keys_RGD.shape[1:])
        k_nPGD, v_nPGD = (x_RGD[at].float().view(shape) for x_RGD in (keys_RGD, values_RGD))
        quantspec_pack(k_nPGD, v_nPGD, place.pages, self.planes[layer])

    def pages(self, layer: int) -> Any:
        tails = self._tails[layer]
        return QuantSpecPages(self.planes[layer], Tails((), (), ()) if tails is None else tails)


class QuantSpecKernel(AttentionKernel):
    """Reads `QuantSpecPages`: both planes (``full``, the target) or the upper one (the draft)."""

    def __init__(self, format: QuantSpecKV, full: bool) -> None:
        self.format, self.full = format, full

    def plan(self, layout: StepLayout) -> Step:
        return self.format.step(layout)

    def run(
        self,
        plan: Step,
        layer: int,
        q_THD: Tensor,
        pages: Any,
        layout: StepLayout,
        spec: AttentionSpec,
        selection: Selection,
        observe: Any = None,
    ) -> Tensor:
        if not isinstance(selection, Dense):
            raise UnsupportedError(f"quantspec pages are read densely, not by a {type(selection).__name__}")
        if spec.window is not None:
            raise UnsupportedError(f"layer {layer} has a sliding window; quantspec reads the whole context")
        out_THD, _ = quantspec_attend(
            q_THD.contiguous(),
            pages.planes,
            pages.tails,
            layout.query_start_S1,
            plan.position_S,
            plan.bound_T,
            plan.table_SM,
            spec.scale,
            spec.softcap,
            full=self.full,
        )
        return out_THD
