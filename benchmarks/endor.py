"""Speed of `endor` (acceptance 4 and 5 of its specification): `python -m benchmarks.endor --json FILE`.

``decompress``: gigabytes of dense output per second of one thread, by instruction-set level and sparsity.

``disk``: sequential reads of this machine, direct and through the page cache (dropped before).

``stream``: passes through all layers of a model with nothing resident, {dense, bitmap} x {staged, direct}, with an
emulated link (``--link`` GB/s; none: the disk itself) and with sparsity 0.4 to 0.7: interleaved; the ratio beside that
of the streamed bytes. One row of input per layer, so that computing is a decode step's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import recording
from hasten.kernels import available_levels
from hasten.kernels.endor import compress, expand
from hasten.kernels.native import _module
from hasten.measure.statistics import median_interval
from hasten.weights.layer_file import LayerFile, buffer, write_layers
from hasten.weights.weight_store import WeightStore

ARMS = {f"{form} {read}": (form, read) for form in ("dense", "bitmap") for read in ("staged", "direct")}
# Outputs and inputs of the linears of a layer of some 13 million weights.
SHAPES = {
    "qkv_proj": (1536, 1024),
    "o_proj": (1024, 1024),
    "gate_up_proj": (8192, 1024),
    "down_proj": (1024, 4096),
}


def weights(layers: int, sparsity: float) -> list[dict[str, torch.Tensor]]:
    """Packed layers of random weights with random masks: one layer's, repeated."""
    random = torch.Generator().manual_seed(0)
    layer = {}
    for name, (outputs, inputs) in SHAPES.items():
        packed = torch.randn(outputs // 16, inputs, 16, generator=random)
        packed[torch.rand(packed.shape, generator=random) < sparsity] = 0
        layer[name] = packed.to(torch.bfloat16)
    return [layer] * layers


def decompress(options: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for sparsity in options.sparsity:
        dense = weights(1, sparsity)[0]["gate_up_proj"]
        bitmap, to = compress(dense), torch.empty_like(dense)
        for level in available_levels():
            module = _module(level)
            times = []
            for _ in range(9):
                started = time.perf_counter()
                expand(bitmap, to, parallel=False, module=module)
                times.append(time.perf_counter() - started)
            best = min(times)
            out[f"{level} {sparsity}"] = dense.nbytes / best
            print(
                f"{level}, sparsity {sparsity}: {dense.nbytes / best / 1e9:.2f} GB/s of dense output",
                flush=True,
            )
    return out


def disk(folder: Path) -> dict[str, float]:
    out = {}
    for read in ("direct", "staged"):
        file = LayerFile(folder / "dense-0.5", direct=read == "direct")
        into = buffer(file.regions[0].size)
        started = time.perf_counter()
        for layer in range(len(file.regions)):
            file.read(layer, into)
        out[read] = file.bytes_read / (time.perf_counter() - started)
        print(f"{read} reads: {out[read] / 1e9:.2f} GB/s", flush=True)
        file.close()
    return out


def one_pass(store: WeightStore) -> float:
    """Seconds of one row through all layers."""
    x = {inputs: torch.randn(1, inputs) for _, inputs in SHAPES.values()}
    started = time.perf_counter()
    for layer in range(len(store.file.regions)):
        for name, (outputs, inputs) in SHAPES.items():
            store.linear(layer, name, outputs, None)(x[inputs])
    return time.perf_counter() - started


def stream(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for sparsity in options.sparsity:
        stores = {}
        for arm, (form, read) in ARMS.items():
            rate = None if options.link is None else options.link * 1e9
            stores[arm] = WeightStore(LayerFile(folder / f"{form}-{sparsity}", read == "direct", rate), 0)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(options.rounds + 1):
            for arm, store in stores.items():
                # Stopped in between, so that no arm reads ahead while another is timed.
                fresh = WeightStore(store.file, 0)
                one_pass(fresh)  # touches the buffers, fills the pipeline
                passed = (one_pass(fresh) + one_pass(fresh)) / 2
                fresh.close()
                if turn:
                    seconds[arm].append(passed)
        ours = seconds["bitmap direct"]
        size = {arm: store.streamed_bytes() for arm, store in stores.items()}
        row = {
            "median_s": {arm: statistics.median(values) for arm, values in seconds.items()},
            "bytes": size,
            "bytes_ratio": size["dense direct"] / size["bitmap direct"],
            "speed_over": {
                arm: median_interval([b / a for a, b in zip(ours, values, strict=True)]).to_dict()
                for arm, values in seconds.items()
            },
        }
        out[str(sparsity)] = row
        ratio = row["speed_over"]["dense direct"]["median"]
        print(
            f"sparsity {sparsity}: {ratio:.2f}x dense direct, bytes {row['bytes_ratio']:.2f}x, {row['median_s']}",
            flush=True,
        )
        for store in stores.values():
            store.close()
            store.file.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["decompress", "disk", "stream"],
        default=["decompress", "disk", "stream"],
    )
    parser.add_argument("--layers", type=int, default=40, help="of 14.2 million weights each")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--link", type=float, help="emulated link, GB/s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    with recording(1, options.json) as result:
        result |= {"link": options.link}
        if "decompress" in options.parts:
            result["decompress"] = decompress(options)
        with tempfile.TemporaryDirectory(prefix="hasten-endor-", dir=options.folder) as name:
            folder = Path(name)
            if options.parts != ["decompress"]:
                for sparsity in {0.5, *options.sparsity}:
                    for form in ("dense", "bitmap"):
                        (folder / f"{form}-{sparsity}").mkdir()
                        write_layers(
                            folder / f"{form}-{sparsity}", weights(options.layers, sparsity), form == "bitmap"
                        )
            if "disk" in options.parts:
                result["disk"] = disk(folder)
            if "stream" in options.parts:
                result["stream"] = stream(options, folder)


if __name__ == "__main__":
    main()
