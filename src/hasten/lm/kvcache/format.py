"""Slot ``kv_format``: how a page stores keys and values.

Legend: N pages, G kv heads, P page size, D head size, T rows of the step, H query heads, R rotated dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import HeadShape, KVPages, StepLayout
from hasten.core.errors import UnsupportedError
from hasten.kernels.rope import rope_append
from hasten.models.rope import apply_rotation


class KVFormat(ABC):
    """Storage of all layers' pages. Allocated once; pages are named by integer ids shared by all layers."""

    pre_rope: bool = False  # True: keys arrive unrotated and the kernel rotates them when reading
    plain: bool = (
        False  # True: pages are `KVPages`, and appending is no more than writing rotated keys and values
    )
    page_size: int | None = (
        None  # tokens of a page, where the format knows no other; the engine then takes it
    )

    @abstractmethod
    def allocate(self, layers: int, pages: int, page_size: int, shape: HeadShape) -> None:
        """Reserve storage for ``pages`` pages per layer. Called once."""

    @abstractmethod
    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, layout: StepLayout) -> None:
        """Write the step's keys and values at ``layout.slot_T``."""

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
        """Rotate queries and (unless ``pre_rope``) keys, and `append`; what the engine calls.

        Returns the rotated queries and the keys as cached. May overwrite its inputs. Override to fuse the two.
        """
        q_THD = apply_rotation(q_THD, cos_TR, sin_TR)
        if not self.pre_rope:
            k_TGD = apply_rotation(k_TGD, cos_TR, sin_TR)
        self.append(layer, k_TGD, v_TGD, layout)
        return q_THD, k_TGD

    @abstractmethod
    def pages(self, layer: int) -> Any:
        """What the attention kernel reads: `KVPages`, or a format's own type for its own kernel."""

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """Copy a page in every layer (copy on write)."""

    def copy_tokens(self, source_T: Tensor, target_T: Tensor) -> None:
        """Copy tokens between slots (int64, page * P + offset) in every layer; all are read before any is written."""
        raise UnsupportedError(f"{type(self).__name__} cannot move tokens within the cache")

    def read_page(self, page: int) -> list[Tensor]:
        """A page's content over all layers, as tensors of the format's own making (for tiers and files)."""
        raise UnsupportedError(f"{type(self).__name__} pages cannot be moved out of the cache")

    def write_page(self, page: int, content: list[Tensor]) -> None:
        """Fill a page with what `read_page` gave."""
        raise UnsupportedError(f"{type(self).__name__} pages cannot be moved into the cache")

    @abstractmethod
    def page_bytes(self, layers: int, page_size: int, shape: HeadShape) -> int:
        """Bytes of one page over all layers, for the memory budget. Callable before ``allocate``."""

    def kernel(self) -> AttentionKernel | None:
        """The kernel that reads the pages, where no other can; None: any kernel that reads `KVPages`."""
        return None

    # A format that keeps something per sequence beside the pages follows the sequence's life:

    def shareable(self, length: int, page_size: int) -> int:
        """How many of a sequence's first ``length`` cached tokens may lie in pages that others share: whole pages."""
        return length // page_size * page_size

    def forked(self, source: int, target: int) -> None:
        """Sequence ``target`` starts as a copy of ``source`` (the ids of `StepLayout.sequence_ids`)."""

    def renamed(self, old: int, new: int) -> None:
        """The sequence has another id from now on."""

    def forget(self, sequence_id: int) -> None:
        """The sequence lost its pages."""


class PlainKV(KVFormat):
    """The default: float32 or bfloat16 pages, [N, G, P, D] per layer for keys and for values."""

    plain = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"KV pages are float32 or bfloat16, not {dtype}")
        self.dtype = dtype
        self.layers: list[KVPages] = []
        self._slots: tuple[StepLayout | None, Tensor | None, Tensor | None] = (None, None, None)

    def allocate(self, layers: int, pages: int, page_size: int, shape: HeadShape) -> None:
        size = (pages, shape.kv_heads, page_size, shape.size)
        # Uninitialised on purpose: a page is written before it is read, and untouched pages cost no memory.
        self.layers = [
            KVPages(torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=self.dtype))
            for _ in range(layers)
        ]

    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, layout: StepLayout) -> None:
        pages = self.layers[layer]
        known, page_T, offset_T = self._slots
        if known is not layout:  # the same for all layers of a step
            page_T, offset_T = layout.slot_T // layout.page_size, layout.slot_T % layout.page_size
            self._slots = (layout, page_T, offset_T)
        pages.k_NGPD[page_T, :, offset_T] = k_TGD.to(self.dtype)
        pages.v_NGPD[page_T, :, offset_T] = v_TGD.to(self.dtype)

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
        pages = self.layers[layer]
        rope_append(q_THD, k_TGD, v_TGD, cos_TR, sin_TR, layout.slot_T, pages.k_NGPD, pages.v_NGPD)
        return q_THD, k_TGD

    def pages(self, layer: int) -> KVPages:
        return self.layers[layer]

    def copy_page(self, source: int, target: int) -> None:
        for pages in self.layers:
            pages.k_NGPD[target] = pages.k_NGPD[source]
            pages.v_NGPD[target] = pages.v_NGPD[source]

    def copy_tokens(self, source_T: Tensor, target_T: Tensor) -> None:
        for pages in self.layers:
            size = pages.k_NGPD.shape[2]
            there, here = (target_T // size, target_T % size), (source_T // size, source_T % size)
            for x_NGPD in (pages.k_NGPD, pages.v_NGPD):
                x_NGPD[there[0], :, there[1]] = x_NGPD[here[0], :, here[1]]

    def read_page(self, page: int) -> list[Tensor]:
        return [torch.stack([kv.k_NGPD[page], kv.v_NGPD[page]]) for kv in self.layers]

    def write_page(self, page: int, content: list[Tensor]) -> None:
        if len(content) != len(self.layers):
            raise ValueError(f"page content has {len(content)} layers, the cache {len(self.layers)}")
        for kv, (key_GPD, value_GPD) in zip(self.layers, content, strict=True):
            kv.k_NGPD[page] = key_GPD
            kv.v_NGPD[page] = value_GPD

    def page_bytes(self, layers: int, page_size: int, shape: HeadShape) -> int:
        return 2 * layers * shape.kv_heads * page_size * shape.size * self.dtype.itemsize
