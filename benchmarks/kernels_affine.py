"""Group-quantised linear kernels on a model's own layers: time, bandwidth, arithmetic and the fraction of a bound.

    python benchmarks/kernels_affine.py [MODEL] [--rows 1,2,4,...] [--threads N] [--activations float32,int16,int8]

A pass multiplies all layers in their order, so that weights come from memory as they do when a token is decoded. The bound is
the larger of weight bytes over the measured read bandwidth and multiplications over the peak of the kernel's own instruction
mix (multiply-adds of 8 floats; int16 pairs and their sums; int8 quads), on the CPU's measured clock. Best of several passes;
the cost of calling from Python, measured with no rows, is taken off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from hasten.kernels import native
from hasten.models.checkpoint import open_checkpoint
from hasten.models.loader import load_decoder
from hasten.models.store import resolve
from hasten.weights.native import NativeFormat
from hasten.weights.packed import KernelLinear

# Multiply-adds per cycle and core: two units of 8 floats; four units shared by products and sums of 16 or 32 integers.
PER_CYCLE = {"float32": 16, "int16": 32, "int8": 64}


def best(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit into ``seconds`` (at least three)."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
