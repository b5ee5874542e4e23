"""Speed of a layer and quality of a model under `quik`: `python -m benchmarks.quik --json FILE`.

Parts (``--parts``), arms of a case interleaved round by round:

    block     the four linears of a decoder block: quik against dense float32 and bfloat16, against 8 bits per token
              without outliers (W8A8, the same kernels), and against itself with its stages apart; per number of rows
              and model width
    outliers  the same with 0, 16, 32 and 64 outlier features (twice or more for wide inputs, as the technique does)
    few       rounded inputs against the same packed codes times float32 inputs: from how many rows on rounding pays
    quality   held-out perplexity of the default model over that of its unquantised weights, calibrated with every arm's
              settings (kept as artefacts), and the share of multiply-adds at every precision

``apart`` runs every stage as passes of its own (split, range, codes; outlier product; integer product to memory;
rescaling), ``rounding fused`` joins the first three. Without VNNI the exact 8-bit product runs at half the rate of the
4-bit one, so that the ratio over W8A8 here says more about the processor than about 4 bits. Whole prompts are timed by
`hasten bench quik`. Run on a quiet machine. Ratios are medians of paired rounds with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hydragen import rounds_of
from benchmarks.recording import recording
from hasten.core import paths
from hasten.core.corpus import corpus
from hasten.kernels.native import level
from hasten.kernels.packed import Packed
from hasten.kernels.quik import forward_stages, pack_quik, quik
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import Decoder
from hasten.models.store import resolve
from hasten.weights.calibrate_data import draw_segments
from hasten.weights.dense import DenseLinear
from hasten.weights.packed import KernelLinear
from hasten.weights.quik import QUIK
from hasten.weights.quik_linear import QuikLinear

PARTS = ("block", "outliers", "few", "quality")
# Outputs and inputs of qkv, o, gate_up and down.
WIDTHS = {
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "2048 wide": ((3072, 2048), (2048, 2048), (11264, 2048), (2048, 5632)),
}
OUTLIERS = {
    "smollm2-135m": 64,
    "2048 wide": 128,
}  # the default, which the quality part measures; 6% as in the paper
Arms = dict[str, Callable[[], object]]
Layer = Callable[[Tensor], Tensor]

QUALITY: dict[str, dict[str, Any]] = {
    "default": {},
    "4-bit down": {"down_bits": 4},
    "no outliers, 4-bit down": {"down_bits": 4, "outliers": 0},
    "W4A4 rounding": {"down_bits": 4, "outliers": 0, "sweep": False},
    "0 outliers": {"outliers": 0},
    "16 outliers": {"outliers": 16},
    "32 outliers": {"outliers": 32},
    "left to right": {"act_order": False},
    "by energy": {"act_order": True},
    "no clipping": {"clip": False},
    "weights only": {"round_activations": False},
    "W8A8": {"bits": 8, "outliers": 0},
    "2:4": {"sparse": True, "act_order": False},
}


def rounded(outputs: int, inputs: int, outliers: int, bits: int, min_rows: int = 1) -> Packed:
    """A layer of random codes: time does not depend on them."""
    codes_OK = torch.randint(0, 1 << bits, (outputs, inputs - outliers), dtype=torch.uint8)
    outlier_F = torch.randperm(inputs)[:outliers].sort().values
    weights_OF = torch.randn(outputs, outliers)
    return quik(pack_quik(codes_OK, torch.rand(outputs), outlier_F, weights_OF, bits=bits, min_rows=min_rows))


def block(width: str, outliers: int, bits: int = 4, down_bits: int = 8, min_rows: int = 1) -> list[Packed]:
    """The four linears of a block; wide inputs have proportionally more outliers (whole multiples)."""
    hidden, out = WIDTHS[width][0][1], []
    for index, (outputs, inputs) in enumerate(WIDTHS[width]):
        count = outliers * (inputs // hidden)
        out.append(rounded(outputs, inputs, count, down_bits if index == 3 else bits, min_rows))
    return out


def dense_block(width: str, dtype: torch.dtype) -> list[Packed]:
    return [DenseLinear(torch.randn(o, i) * i**-0.5, None, dtype).kernel() for o, i in WIDTHS[width]]


def run_all(layers: list[Layer], inputs: dict[int, Tensor], widths: list[int]) -> Callable[[], object]:
    def run() -> object:
        return [layer(inputs[width]) for layer, width in zip(layers, widths, strict=True)]

    return run


def of_stages(layers: list[Packed], fusion: str) -> list[Layer]:
    return [lambda x, layer=layer: forward_stages(layer, x, fusion) for layer in layers]


def compared(arms: Arms, base: str, rounds: int) -> dict[str, Any]:
    """Medians, and the speed of ``base`` over every other arm."""
    seconds = rounds_of(arms, rounds)
    return {
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speed_over": {
            name: median_interval([b / a for a, b in zip(seconds[base], values, strict=True)]).to_dict()
            for name, values in seconds.items()
            if name != base
        },
    }


def block_part(width: str, rows: int, rounds: int) -> dict[str, Any]:
    widths = [i for _, i in WIDTHS[width]]
    inputs = {i: torch.randn(rows, i) for i in widths}
    ours = block(width, OUTLIERS[width])
    arms: dict[str, list[Any]] = {
        "quik": ours,
        "apart": of_stages(ours, "none"),
        "rounding fused": of_stages(ours, "quantize"),
        "float32": dense_block(width, torch.float32),
        "bfloat16": dense_block(width, torch.bfloat16),
        "W8A8": block(width, 0, 8),
    }
    return compared({name: run_all(layers, inputs, widths) for name, layers in arms.items()}, "quik", rounds)


def outliers_part(width: str, rows: int, rounds: int) -> dict[str, Any]:
    widths = [i for _, i in WIDTHS[width]]
    inputs = {i: torch.randn(rows, i) for i in widths}
    arms = {str(count): run_all(block(width, count), inputs, widths) for count in (0, 16, 32, 64)}
    return compared(arms, "0", rounds)


def few_part(width: str, rows: int, rounds: int) -> dict[str, Any]:
    widths = [i for _, i in WIDTHS[width]]
    inputs = {i: torch.randn(rows, i) for i in widths}
    arms = {
        "rounded": run_all(block(width, OUTLIERS[width]), inputs, widths),
        "weights only": run_all(block(width, OUTLIERS[width], min_rows=rows + 1), inputs, widths),
        "float32": run_all(dense_block(width, torch.float32), inputs, widths),
    }
    return compared(arms, "rounded", rounds)


def shares(decoder: Decoder) -> dict[str, float]:
    """Share of a token's multiply-adds in linears by bits of both factors; outliers and dense layers count as 16."""
    work: dict[str, float] = {"4": 0, "8": 0, "16": 0}
    for _, linear in decoder.linears():
        assert isinstance(linear, KernelLinear)
        count = linear.outlier_F.numel() if isinstance(linear, QuikLinear) else linear.inputs
        if isinstance(linear, QuikLinear):
            work[str(linear.weight.bits)] += (linear.inputs - count) * linear.outputs
        work["16"] += count * linear.outputs
    total = sum(work.values())
    return {bits: share / total for bits, share in work.items()}


@torch.no_grad()
def perplexity(decoder: Decoder, token_ids_NL: Tensor) -> float:
    losses = [
        float(torch.nn.functional.cross_entropy(decoder(ids_L[None])[0, :-1], ids_L[1:]))
        for ids_L in token_ids_NL
    ]
    return math.exp(statistics.mean(losses))


def quality_part(names: list[str], model: str, samples: int, held_out: int) -> dict[str, Any]:
    checkpoint = open_checkpoint(resolve(model))
    context = BuildContext.of(checkpoint, paths.home() / "artefacts")
    documents = corpus().documents("test")
    token_ids_NL = draw_segments(
        [len(document.text) for document in documents],
        lambda i: context.tokenizer.encode(documents[i].text),
        held_out,
        512,
        seed=1,
    )
    reference = perplexity(load_decoder(checkpoint), token_ids_NL)
    out: dict[str, Any] = {"reference": reference, "tokens": token_ids_NL.numel(), "arms": {}}
    for name in names:
        technique = QUIK(samples=samples, quantize_head="float32", **QUALITY[name])
        decoder = load_decoder(checkpoint, pack=technique.provide("weight_format", context).pack)
        found = perplexity(decoder, token_ids_NL)
        row = {"perplexity": found, "ratio": found / reference, "shares": shares(decoder)}
        out["arms"][name] = row | {"settings": technique.model_dump(mode="json")}
        print(f"{name:>24}  {found:9.2f}  {found / reference:7.3f}x  {row['shares']}", flush=True)
    return out


def show(title: str, result: Mapping[str, Any]) -> None:
    print(title)
    for name, value in result["median_ms"].items():
        ratio = result["speed_over"].get(name)
        beside = (
            "" if ratio is None else f"  {ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        )
        print(f"{name:>24}  {value:9.3f} ms{beside}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 512, 2048])
    parser.add_argument("--few", nargs="+", type=int, default=[1, 2, 4, 8, 12, 16, 24])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--arms", nargs="+", choices=list(QUALITY), default=list(QUALITY))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--samples", type=int, default=64, help="calibration segments of 512 tokens")
    parser.add_argument("--held-out", type=int, default=16, help="segments of 512 tokens to evaluate on")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    with recording(args.threads, args.json) as result:
        result |= {"level": level()}
        timed = {"block": block_part, "outliers": outliers_part, "few": few_part}
        for part, measured in timed.items():
            for width in args.widths if part in args.parts else ():
                for rows in args.few if part == "few" else args.rows:
                    found = measured(width, rows, args.rounds)
                    result.setdefault(part, {}).setdefault(width, {})[str(rows)] = found
                    show(f"{part}: {width}, {rows} rows", found)
        if "quality" in args.parts:
            result["quality"] = quality_part(args.arms, args.model, args.samples, args.held_out)


if __name__ == "__main__":
    main()
