"""The slow tier of a prefix store: pages copied out of the pool, in memory of their own or in a file.

A page's content is what `KVFormat.read_page` and `Sidecars.read_page` give: a list of tensors, the same shapes for
every page. A slot of the arena holds one page, tensor after tensor, each at a multiple of 64 bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from hasten.core.errors import SettingError

_ALIGN = 64


class HostTier:
    """``capacity`` slots of one page. Memory is taken page by page as slots are first written.

    like: the content of one page, for its shapes. megabytes: the budget (10^6 bytes). folder: keep the slots in a
    file there, mapped into memory, instead of in memory of their own; the file has no name and ends with the process.
    """

    def __init__(self, like: Sequence[Tensor], megabytes: float, folder: Path | None = None) -> None:
        self._places: list[tuple[int, int, torch.dtype, torch.Size]] = []
        at = 0
        for x in like:
            self._places.append((at, at + x.nbytes, x.dtype, x.shape))
            at += -(-x.nbytes // _ALIGN) * _ALIGN
        self.page_bytes = at
        self.capacity = int(megabytes * 1e6 // at)
        size = self.capacity * at
        if folder is None:
            free = psutil.virtual_memory().available
            if size > free:
                raise SettingError(
                    f"host_mb = {megabytes:g}: only {free / 1e6:.0f} MB of memory are free; "
                    "lower it, or name a host_folder to use a file"
                )
            arena = torch.empty(size, dtype=torch.uint8)
        else:
            arena = _mapped(folder, size)
        self._arena = arena.view(self.capacity, at)
        self._free = list(range(self.capacity - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def put(self, content: Sequence[Tensor]) -> int:
        """Copy a page in; its slot. There must be a free one."""
        slot = self._free.pop()
        row = self._arena[slot]
        for (start, stop, dtype, shape), x in zip(self._places, content, strict=True):
            if x.dtype != dtype or x.shape != shape:
                raise ValueError(
                    f"page content {tuple(x.shape)} {x.dtype}: the tier holds {tuple(shape)} {dtype}"
                )
            row[start:stop].view(dtype).view(shape).copy_(x)
        return slot

    def get(self, slot: int) -> list[Tensor]:
        """The page in a slot, as views of the arena: to be read before the slot is freed."""
        row = self._arena[slot]
        return [row[start:stop].view(dtype).view(shape) for start, stop, dtype, shape in self._places]

    def drop(self, slot: int) -> None:
        self._free.append(slot)


def _mapped(folder: Path, size: int) -> Tensor:
    """uint8 [size] over a file of ``folder`` that nobody else can open."""
    try:
        handle, name = tempfile.mkstemp(prefix="hasten-pages-", dir=folder)
    except OSError as error:
        raise SettingError(
            f"host_folder = {str(folder)!r}: {error.strerror or error}; name a folder to write to"
        ) from None
    try:
        if size:
            # Room is claimed now: writing to a mapped file on a full disk would kill the process.
            os.posix_fallocate(handle, 0, size)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        raise SettingError(
            f"host_folder = {str(folder)!r} has no room for {size / 1e6:.0f} MB "
            f"({error.strerror or error}); lower host_mb"
        ) from None
    finally:
        os.close(handle)
        os.unlink(name)
