"""Layers of `marlin` against what else multiplies them (acceptance 2, 3, 6): `python -m benchmarks.marlin --json FILE`.

Parts (``--parts``):

    layers    rows 1..256 on the shapes of SmolLM2 and on large layers, cycled over copies that do not fit into cache
    quality   perplexity of the recipe, of plain GPTQ and of rounding, and of the 2:4 sparse model (an hour or so)

Arms: ``torch fp32`` and ``torch bf16`` the library's linear; ``bf16`` our own pre-packed kernel (the headline's
baseline); ``naive`` dequantise, then multiply; ``looped`` the one-row kernel called row by row; ``affine`` the
engine's ordinary 4 bit kernels with int16 activations, blocks dealt out instead of stripes; ``w4a32``, ``w4a16``,
``w4a8`` marlin with float32, int16 and int8 activations; ``sparse`` 2:4. Every round runs all arms; ratios are
medians of paired rounds with 95% intervals.

Run on a quiet machine: a busy one shares its memory bandwidth.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.hydragen import rounds_of
from benchmarks.recording import recording
from hasten.kernels.peak import read_bandwidth
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.weights.affine import AffineLinear
from hasten.weights.dense import DenseLinear
from hasten.weights.gptq_grid import UniformGrid
from hasten.weights.gptq_sweep import QuantizedWeight
from hasten.weights.marlin_layers import SparseMarlinLinear, pack_marlin
from hasten.weights.packed import KernelLinear

SHAPES = {  # inputs, outputs
    "576x576": (576, 576),
    "576x192": (576, 192),
    "576x3072": (576, 3072),
    "1536x576": (1536, 576),
    "4096x4096": (4096, 4096),
    "4096x11008": (4096, 11008),
    "4096x4120 (ragged)": (4096, 4120),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OURS = {"w4a32": "float32", "w4a16": "int16", "w4a8": "int8"}
BASES = ("bf16", "torch bf16", "torch fp32", "naive", "looped", "affine")
# Bytes: more than any cache of the machines this is meant for; what the copies of a layer take at least.
CACHE, OUT_OF_CACHE = 64e6, 160e6
COPIES = 30  # at most: as many as SmolLM2 has layers
SLOW = ("naive", "looped")  # arms that are measured for the large layers too, but on one copy per round

Layer = Callable[[Tensor], Tensor]


def copies_of(size: float) -> int:
    """Copies of a layer of ``size`` bytes."""
    return max(2, min(COPIES, round(OUT_OF_CACHE / size)))


def weight(inputs: int, outputs: int, group: int) -> tuple[QuantizedWeight, QuantizedWeight]:
    """A random weight on the symmetric 4 bit grid, and a 2:4 one."""
    groups = 1 if group == -1 else -(-inputs // group)
    codes_OI = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scale_OG = (torch.rand(outputs, groups) * 0.01 + 0.001).half().float()
    group_I = torch.arange(inputs) // (inputs if group == -1 else group)
    kept = torch.tensor([[i in pair for i in range(4)] for pair in combinations(range(4), 2)])
    kept_OI = kept[torch.randint(0, len(kept), (outputs, inputs // 4))].flatten(1)
    sparse_OI = torch.where(kept_OI, codes_OI, 8)
    grid, zero_OG = UniformGrid(4, symmetric=True), torch.full_like(scale_OG, 8)
    dense, sparse = (
        QuantizedWeight(grid, codes, scale_OG, zero_OG, group_I) for codes in (codes_OI, sparse_OI)
    )
    return dense, sparse


def arms_of(inputs: int, outputs: int, group: int, names: list[str]) -> dict[str, list[Layer]]:
    """Per arm, copies of the layer."""
    dense, sparse = weight(inputs, outputs, group)
    dense_OI = dense.dequantize()
    size = inputs if group == -1 else group
    base = pack_marlin(dense, None, "float32", False)

    def again(layer: KernelLinear) -> Callable[[], Layer]:
        return lambda: copy.deepcopy(layer)

    def looped() -> Layer:
        layer = copy.deepcopy(base)
        return lambda x_TI: torch.cat([layer(x_1I) for x_1I in x_TI.split(1)])

    def naive() -> Layer:
        layer = copy.deepcopy(base)
        return lambda x_TI: linear(x_TI, layer.dequantize())

    def library(dtype: torch.dtype) -> Callable[[], Layer]:
        def make() -> Layer:
            weight_OI = dense_OI.to(dtype, copy=True)
            return lambda x_TI: linear(x_TI.to(dtype), weight_OI)

        return make

    affine = AffineLinear(
        dense.codes_OI, dense.a_OG, dense.a_OG * -8.0, bits=4, group_size=size, activations="int16"
    )
    packed = float(base.weight_bytes())
    makers: dict[str, tuple[float, Callable[[], Layer]]] = {
        "torch fp32": (inputs * outputs * 4, library(torch.float32)),
        "torch bf16": (inputs * outputs * 2, library(torch.bfloat16)),
        "bf16": (inputs * outputs * 2, again(DenseLinear(dense_OI, None, torch.bfloat16))),
        "naive": (packed, naive),
        "looped": (packed, looped),
        "affine": (packed, again(affine)),
        **{name: (packed, again(pack_marlin(dense, None, how, False))) for name, how in OURS.items()},
        "sparse": (packed * 3.25 / 4.25, again(pack_marlin(sparse, None, "float32", True))),
    }
    return {
        name: [make() for _ in range(copies_of(size))]
        for name, (size, make) in makers.items()
        if name in names
    }


def sweep(name: str, options: argparse.Namespace, read: float) -> dict[str, Any]:
    """One shape: every arm at every number of rows."""
    inputs, outputs = SHAPES[name]
    layers = arms_of(inputs, outputs, options.group, options.arms)
    at = dict.fromkeys(layers, 0)
    out: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "rows": {}}
    for rows in options.rows:
        x_TI = torch.randn(rows, inputs)

        def one_pass(arm: str, x_TI: Tensor = x_TI) -> None:
            copies = layers[arm]
            for _ in range(1 if arm in SLOW or inputs * outputs > 4e6 else len(copies)):
                at[arm] = (at[arm] + 1) % len(copies)
                copies[at[arm]](x_TI)

        runs = {arm: (lambda arm=arm: one_pass(arm)) for arm in layers}
        seconds = rounds_of(runs, options.rounds)
        for arm, values in seconds.items():
            calls = 1 if arm in SLOW or inputs * outputs > 4e6 else len(layers[arm])
            seconds[arm] = [value / calls for value in values]
        out["rows"][str(rows)] = {
            "median_us": {arm: 1e6 * statistics.median(values) for arm, values in seconds.items()},
            "best_us": {arm: 1e6 * min(values) for arm, values in seconds.items()},
            "speed_over": {
                base: {
                    arm: median_interval(
                        [b / a for a, b in zip(seconds[arm], seconds[base], strict=True)]
                    ).to_dict()
                    for arm in (*OURS, "sparse")
                    if arm in seconds
                }
                for base in BASES
                if base in seconds
            },
        }
    first = out["rows"].get("1")
    if first:
        # A stream from memory is one that no cache holds: of layers that leave it.
        stored = {
            arm: copies[0].weight_bytes()
            for arm, copies in layers.items()
            if isinstance(copies[0], KernelLinear) and len(copies) * copies[0].weight_bytes() > CACHE
        }
        out["stream"] = {
            arm: {"bytes_per_s": rate, "share_of_read": rate / read}
            for arm, size in stored.items()
            for rate in [size / first["median_us"][arm] * 1e6]
        }
        out["latency_over_one_row"] = {
            rows: {arm: value / first["median_us"][arm] for arm, value in row["median_us"].items()}
            for rows, row in out["rows"].items()
        }
    if any(isinstance(copies[0], SparseMarlinLinear) for copies in layers.values()) and "w4a32" in layers:
        out["sparse_over_dense"] = {
            rows: row["median_us"]["w4a32"] / row["median_us"]["sparse"] for rows, row in out["rows"].items()
        }
    return out


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity over the unquantised model's: rounding, plain GPTQ, the recipe step by step, 2:4."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from benchmarks.gptq import bytes_per_token, make_reference
    from benchmarks.gptq import quality as quality_of
    from hasten.core.artefact import ArtefactStore
    from hasten.models.checkpoint import LinearSource, load_decoder, open_checkpoint
    from hasten.models.context import BuildContext
    from hasten.models.store import resolve
    from hasten.weights.format import PackedLinear
    from hasten.weights.gptq_pack import pack_head
    from hasten.weights.gptq_sweep import round_to_nearest
    from hasten.weights.marlin import Marlin

    checkpoint = open_checkpoint(resolve(options.model))
    context = BuildContext.of(checkpoint, Path("unused"))
    reference = make_reference(context, options.held_out, 512)
    plain: dict[str, Any] = {"act_order": False, "clip": False, "varying": False, "percdamp": 0.01}
    cases: dict[str, dict[str, Any]] = {
        "plain GPTQ": plain,
        "dampening 0.1": plain | {"percdamp": 0.1},
        "and clipping": plain | {"percdamp": 0.1, "clip": True},
        "and varying samples": {"act_order": False},
        "and act_order (default)": {},
        "default, w4a8": {"activations": "int8"},
        "2:4 sparse": {"sparse": True},
    }
    common = {
        "group_size": options.group,
        "samples": options.samples,
        "sample_length": options.sample_length,
        "quantize_head": "float32",
    }

    def rounded(source: LinearSource) -> PackedLinear:
        if source.name == "lm_head":
            return pack_head(source, "float32")
        size = None if options.group == -1 else options.group
        weight = round_to_nearest(source.dense(), UniformGrid(4, symmetric=True), size)
        return pack_marlin(weight, source.bias_O, "float32", False)

    rows = {"rounding": quality_of(load_decoder(checkpoint, pack=rounded), reference)}
    with TemporaryDirectory(prefix="hasten-marlin-") as folder:
        store = ArtefactStore(Path(folder), checkpoint.fingerprint)
        for name, settings in cases.items():
            weights = Marlin(**common, **settings).provide("weight_format", replace(context, artefacts=store))
            decoder = load_decoder(checkpoint, pack=weights.pack)
            rows[name] = quality_of(decoder, reference) | {"bytes_per_token": bytes_per_token(decoder)}
            print(json.dumps({"case": name, **rows[name]}), flush=True)
    return {"reference_perplexity": reference.perplexity, "cases": rows}


def tables(result: dict[str, Any], console: Console) -> None:
    for name, shape in result.get("layers", {}).items():
        arms = list(next(iter(shape["rows"].values()))["median_us"])
        ours = [arm for arm in (*OURS, "sparse") if arm in arms]
        out = Table("rows", *(f"{arm} us" for arm in arms), *(f"{arm} / bf16" for arm in ours), title=name)
        for rows, row in shape["rows"].items():
            over = row["speed_over"].get("bf16", {})
            ratios = [f"{over[a]['median']:.2f}x [{over[a]['low']:.2f}, {over[a]['high']:.2f}]" for a in over]
            out.add_row(rows, *(f"{row['median_us'][arm]:.0f}" for arm in arms), *ratios)
        console.print(out)
        for arm, stream in shape.get("stream", {}).items():
            console.print(
                f"{arm}: {stream['bytes_per_s'] / 1e9:.1f} GB/s, {stream['share_of_read']:.0%} of memory"
            )
    for name, row in result.get("quality", {}).get("cases", {}).items():
        console.print(f"{name}: perplexity {row['ratio']:.3f}x, KL {row['kl']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["torch fp32", "torch bf16", "bf16", "naive", "looped", "affine", *OURS, "sparse"]
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--parts", nargs="+", choices=["layers", "quality"], default=["layers"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=every, default=every)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--group", type=int, choices=[32, 64, 128, -1], default=64)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sample-length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=16, help="segments of 512 tokens to evaluate on")
    options = parser.parse_args()
    with recording(options.threads, options.json) as result:
        if "layers" in options.parts:
            read = read_bandwidth()
            result |= {"read_bytes_per_s": read, "group": options.group, "layers": {}}
            with torch.no_grad():
                for name in options.shapes:
                    result["layers"][name] = sweep(name, options, read)
        if "quality" in options.parts:
            result["quality"] = quality(options)
    tables(result, Console(width=180))


if __name__ == "__main__":
    main()
