"""What this machine can do at most: bounds for every other kernel. Each takes a good part of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.kernels.native import native

__all__ = ["Peak", "measure_peak"]

_BYTES = 1 << 28  # far more than any last-level cache of a small machine
_ROUNDS = 2_000_000


@dataclass(frozen=True)
class Peak:
    """Measured limits with the threads torch uses now. read: bytes/s from memory; float32, int8: operations/s."""

    read: float
    float32: float
    int8: float


def measure_peak(repeats: int = 5, *, size: int = _BYTES, rounds: int = _ROUNDS) -> Peak:
    """The best of ``repeats`` runs each, over ``size`` bytes and ``rounds`` loops: the level that ``HASTEN_ISA`` or the
    CPU chose."""
    lib, threads = native(), torch.get_num_threads()
    memory = torch.ones(size // 4)
    sink = torch.full((2 + threads,), 0.5)

    def best(run: Callable[[], float]) -> float:
        run()
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            amount = run()
            rates.append(amount / (time.perf_counter() - start))
        return max(rates)

    def read() -> float:
        lib.stream_read(memory.data_ptr(), memory.numel())
        return memory.numel() * 4.0

    return Peak(
        read=best(read),
        float32=best(lambda: lib.fma_rate(rounds, threads, sink.data_ptr())),
        int8=best(lambda: lib.dot8_rate(rounds, threads, sink.data_ptr())),
    )
