"""What this machine can do at most: bounds for every other kernel. Each takes a good part of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.kernels.native import native

__all__ = ["Peak", "measure_peak", "read_bandwidth"]

_BYTES = 1 << 28  # far more than any last-level cache of a small machine
_ROUNDS = 2_000_000


@dataclass(frozen=True)
class Peak:
    """Measured limits with the threads torch uses now. read: bytes/s from memory; float32, int8: operations/s."""

    read: float
    float32: float
    int8: float


def _best(run: Callable[[], float], repeats: int) -> float:
    """The highest rate of ``repeats`` runs, each of which says how much it did; after one to warm up."""
    run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        amount = run()
        rates.append(amount / (time.perf_counter() - start))
    return max(rates)


def read_bandwidth(repeats: int = 5, *, size: int = _BYTES) -> float:
    """Bytes per second that all threads read from memory: the best of ``repeats`` passes over ``size`` bytes."""
    lib, memory = native(), torch.ones(size // 4)

    def read() -> float:
        lib.stream_read(memory.data_ptr(), memory.numel())
        return float(memory.nbytes)

    return _best(read, repeats)


def measure_peak(repeats: int = 5, *, size: int = _BYTES, rounds: int = _ROUNDS) -> Peak:
    """The best of ``repeats`` runs each, over ``size`` bytes and ``rounds`` loops: the level that ``HASTEN_ISA`` or the
    CPU chose."""
    lib, threads = native(), torch.get_num_threads()
    sink = torch.full((2 + threads,), 0.5)
    return Peak(
        read=read_bandwidth(repeats, size=size),
        float32=_best(lambda: lib.fma_rate(rounds, threads, sink.data_ptr()), repeats),
        int8=_best(lambda: lib.dot8_rate(rounds, threads, sink.data_ptr()), repeats),
    )
