"""Group-quantised linear kernels on a model's own layers: time, bandwidth, arithmetic, and how near a bound they are.

    python -m benchmarks.kernels_affine [--model M] [--rows 1,2,4,...] [--threads N] [--activations float32,int16,int8]

A pass multiplies all layers in their order, so that weights come from memory as when a token is decoded. The bound is
the larger of two times: weight bytes over the read bandwidth measured here, and multiply-adds over what the kernel's
instructions allow at the clock given by --ghz. Best of the passes that fit into a second; what the calls from Python
cost, measured with no rows, is taken off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from hasten.kernels.peak import read_bandwidth
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.store import resolve
from hasten.weights.native import NativeFormat
from hasten.weights.packed import KernelLinear

# Multiply-adds per cycle and core with AVX2: two units of 8 floats, or four units that share products of 2 x 8 int16
# (4 x 8 int8) and their sums.
PER_CYCLE = {"float32": 16, "int16": 32, "int8": 64}


def best(run: Callable[[], object], seconds: float = 1.0) -> float:
    """The shortest of the runs that fit into ``seconds``, at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", default="1,2,4,8,16,32,512")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--activations", default="float32,int16,int8")
    parser.add_argument("--ghz", type=float, default=3.2, help="clock of the cores under load")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint, read = open_checkpoint(resolve(options.model)), read_bandwidth()
    table = Table("activations", "rows", "ms", "GB/s", "GOP/s", "of the bound", title=options.model)
    for activations in options.activations.split(","):
        decoder = load_decoder(checkpoint, pack=NativeFormat(activations).pack)
        linears = [linear for _, linear in decoder.linears() if isinstance(linear, KernelLinear)]
        kernels = [linear.kernel() for linear in linears]
        stored = sum(linear.weight_bytes() for linear in linears)
        for rows in map(int, options.rows.split(",")):
            inputs = {kernel.inputs: torch.randn(rows, kernel.inputs) for kernel in kernels}
            none = {width: x[:0] for width, x in inputs.items()}

            def run(inputs: dict[int, torch.Tensor], kernels: list = kernels) -> None:
                for kernel in kernels:
                    kernel(inputs[kernel.inputs])

            seconds = best(lambda x=inputs: run(x)) - best(lambda x=none: run(x), 0.1)
            macs = rows * sum(kernel.inputs * kernel.outputs for kernel in kernels)
            peak = PER_CYCLE[activations] * options.ghz * 1e9 * options.threads
            bound = max(stored / read, macs / peak)
            table.add_row(
                activations,
                str(rows),
                f"{seconds * 1e3:.2f}",
                f"{stored / seconds / 1e9:.1f}",
                f"{2 * macs / seconds / 1e9:.0f}",
                f"{bound / seconds:.0%}",
            )
    console = Console()
    console.print(table)
    console.print(f"memory reads {read / 1e9:.1f} GB/s with {options.threads} threads")


if __name__ == "__main__":
    main()
