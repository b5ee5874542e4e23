"""Layers of weights on disk: one aligned region per layer, read past the page cache or through it.

``weights.bin`` holds the regions, ``index.json`` says what lies where. A region begins and ends at multiples of 4096
bytes, as direct I/O wants it; the parts of a linear in it at multiples of 64. A linear is its packed [N, I, 16] tensor
(`hasten.kernels.dense`), plain or as a bitmap (`hasten.kernels.endor`).
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten.core.errors import ArtefactError, UnsupportedError
from hasten.kernels.endor import Bitmap, block_count, compress

PAGE = 4096
_ALIGN = 64
_REQUEST = 4 << 20  # bytes of one read
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """Where a linear lies in its layer's region, in bytes. kept: values of a bitmap; None: the plain tensor."""

    shape: tuple[int, int, int]
    dtype: str
    at: int
    kept: int | None = None

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def dense_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def parts(self) -> tuple[int, int, int]:
        """Bytes of block starts, bits and values of a bitmap."""
        assert self.kept is not None
        return (
            4 * (block_count(self.elements) + 1),
            -(-self.elements // 8),
            self.kept * DTYPES[self.dtype].itemsize,
        )

    @property
    def nbytes(self) -> int:
        """Bytes on disk, without what aligns them."""
        return self.dense_bytes if self.kept is None else sum(self.parts())


@dataclass(frozen=True)
class Region:
    """A layer: where it begins in the file, its bytes there, its linears by name."""

    at: int
    size: int
    linears: Mapping[str, Stored]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the layer's buffer when expanded."""
        return sum(_up(stored.dense_bytes, _ALIGN) for stored in self.linears.values())


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def write_layers(folder: Path, layers: Iterable[Mapping[str, Tensor]], bitmap: bool) -> None:
    """Write ``weights.bin`` and ``index.json``: per layer the packed tensors of its linears by name."""
    index: list[dict[str, object]] = []
    with (folder / "weights.bin").open("wb") as file:
        for linears in layers:
            begin, at = file.tell(), 0
            stored: dict[str, Stored] = {}
            for name, packed in linears.items():
                dtype = str(packed.dtype).removeprefix("torch.")
                shape = (packed.shape[0], packed.shape[1], packed.shape[2])
                pieces = [packed]
                kept = None
                if bitmap:
                    small = compress(packed)
                    pieces, kept = [small.start, small.bits, small.values], small.values.numel()
                stored[name] = Stored(shape, dtype, at, kept)
                for piece in pieces:
                    file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                    at += piece.nbytes
                    file.write(bytes(_up(at, _ALIGN) - at))
                    at = _up(at, _ALIGN)
            file.write(bytes(_up(at, PAGE) - at))
            index.append(
                {"at": begin, "size": _up(at, PAGE), "linears": {n: asdict(s) for n, s in stored.items()}}
            )
        file.flush()
        os.fsync(file.fileno())
    (folder / "index.json").write_text(json.dumps(index))


def buffer(size: int) -> Tensor:
    """Page-aligned memory of ``size`` bytes, uint8."""
    return torch.frombuffer(mmap.mmap(-1, max(_up(size, PAGE), PAGE)), dtype=torch.uint8)


def view_bitmap(raw: Tensor, stored: Stored) -> Bitmap:
    """The bitmap of a linear in its layer's bytes."""
    start, bits, values = stored.parts()
    at = stored.at
    parts = []
    for size, dtype in ((start, torch.int32), (bits, torch.uint8), (values, DTYPES[stored.dtype])):
        parts.append(raw[at : at + size].view(dtype))
        at += _up(size, _ALIGN)
    return Bitmap(tuple(stored.shape), parts[1], parts[2], parts[0])


def view_dense(raw: Tensor, stored: Stored, at: int) -> Tensor:
    """The packed tensor at byte ``at``."""
    return raw[at : at + stored.dense_bytes].view(DTYPES[stored.dtype]).view(stored.shape)


class Link:
    """Holds readers back to ``rate`` bytes per second: an emulated disk or link. None: no limit."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free = 0.0

    def pay(self, count: int, started: float) -> None:
        """Wait until ``count`` bytes asked for at ``started`` (monotonic) have arrived; idle time is not saved up."""
        if self.rate is None:
            return
        self._free = max(self._free, started) + count / self.rate
        time.sleep(max(0.0, self._free - time.monotonic()))


class LayerFile:
    """An open file of layers.

    direct: past the page cache into the caller's buffer (O_DIRECT); otherwise through the page cache and a staging
    buffer, and dropped from the cache again, so that every read is one of the disk. rate: see `Link`.
    Raises `ArtefactError` (missing or damaged files), `UnsupportedError` (a file system that refuses O_DIRECT).
    """

    def __init__(self, folder: Path, direct: bool = True, rate: float | None = None) -> None:
        self.path, self.direct, self.link = folder / "weights.bin", direct, Link(rate)
        try:
            index = json.loads((folder / "index.json").read_text())
            self.regions = tuple(
                Region(
                    layer["at"],
                    layer["size"],
                    {n: Stored(**{**s, "shape": tuple(s["shape"])}) for n, s in layer["linears"].items()},
                )
                for layer in index
            )
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{folder} cannot be read ({error}); delete it and prepare it again"
            ) from None
        expected = max((r.at + r.size for r in self.regions), default=0)
        if size != expected:
            raise ArtefactError(
                f"{self.path} has {size} bytes, not {expected}; delete the folder and prepare it again"
            )
        self.bytes_read = 0
        self._staging: Tensor | None = None
        self._fd = self._open()

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            if self.direct and error.errno in (errno.EINVAL, errno.ENOTSUP):
                raise UnsupportedError(self._refused()) from None
            raise
        return fd

    def _refused(self) -> str:
        return f'the file system of {self.path} refuses direct I/O (O_DIRECT); set endor.read = "staged"'

    def read(self, layer: int, into: Tensor) -> None:
        """The bytes of a layer's region to the beginning of ``into``, page-aligned uint8. Raises `ArtefactError`."""
        region = self.regions[layer]
        target = memoryview(into.numpy())  # type: ignore[arg-type]
        if not self.direct and self._staging is None:
            self._staging = buffer(max(r.size for r in self.regions))
        source = target if self._staging is None else memoryview(self._staging.numpy())  # type: ignore[arg-type]
        done = 0
        while done < region.size:
            count, started = min(_REQUEST, region.size - done), time.monotonic()
            try:
                got = os.preadv(self._fd, [source[done : done + count]], region.at + done)
            except OSError as error:
                if self.direct and error.errno == errno.EINVAL:
                    raise UnsupportedError(self._refused()) from None
                raise ArtefactError(f"{self.path} cannot be read: {error}") from None
            if got <= 0:
                raise ArtefactError(f"{self.path} ends inside layer {layer}; prepare it again")
            done += got
            self.link.pay(got, started)
        if self._staging is not None:
            into[: region.size].copy_(self._staging[: region.size])
            os.posix_fadvise(self._fd, region.at, region.size, os.POSIX_FADV_DONTNEED)
        self.bytes_read += region.size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
