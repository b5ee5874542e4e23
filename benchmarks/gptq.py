"""Quality and cost of `gptq` over bits and grids: `python -m benchmarks.gptq --json FILE`.

For every case the default model is quantised from scratch; rounding on the same grid and the unquantised weights stand
beside it. Per arm: held-out perplexity, its ratio to the unquantised model's, KL(reference || arm) in nats per token,
bytes of weights read per token. For GPTQ also the wall time of the quantisation, and over all linears the share of the
output energy that is lost on the calibration data, beside that of rounding. All arms store the head alike (``--head``).

The reference is what the checkpoint dequantises to: the default GGUF is a 4-bit file, so ratios say what the *second*
quantisation costs. ``--model documentation-14m`` has weights that never saw a grid, but it is lightly trained, which
makes it robust: take orderings from it and sensitivity from the default model. Compare GPTQ with rounding within a
row, not rows with the paper. Where 128 does not divide a layer's inputs its last group is shorter. ``--layers`` prints
every linear's error and time. Speed at decode is `hasten bench gptq`. Run on a quiet machine: wall times are part of
the result.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.recording import recording
from hasten.core.artefact import ArtefactStore
from hasten.core.corpus import corpus
from hasten.measure.environment import usable_cpus
from hasten.models.checkpoint import LinearSource, load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import Decoder
from hasten.models.store import resolve
from hasten.weights.calibrate_data import draw_segments
from hasten.weights.format import PackedLinear
from hasten.weights.gptq import GPTQ, read_reports
from hasten.weights.gptq_pack import pack_head, pack_weight
from hasten.weights.gptq_sweep import round_to_nearest

CASES: dict[str, dict[str, Any]] = {
    "8 g64": {"bits": 8, "group_size": 64},
    "4 g32": {"bits": 4, "group_size": 32},
    "4 g64": {"bits": 4, "group_size": 64},
    "4 g64 refit": {"bits": 4, "group_size": 64, "static_groups": False},
    "4 g64 in order": {"bits": 4, "group_size": 64, "act_order": False},
    "4 g64 at once": {"bits": 4, "group_size": 64, "true_sequential": False},
    "4 g64 mse": {"bits": 4, "group_size": 64, "mse": True},
    "4 g128": {"bits": 4, "group_size": 128},
    "4 sym g64": {"bits": 4, "group_size": 64, "symmetric": True},
    "4 sym g128": {"bits": 4, "group_size": 128, "symmetric": True},
    "4 sym row": {"bits": 4, "group_size": -1, "symmetric": True},
    "3 g32": {"bits": 3, "group_size": 32},
    "3 g64": {"bits": 3, "group_size": 64},
    "3 g128": {"bits": 3, "group_size": 128},
    "3 row": {"bits": 3, "group_size": -1},
    "2 g32": {"bits": 2, "group_size": 32},
    "2 g64": {"bits": 2, "group_size": 64},
    "2 g128": {"bits": 2, "group_size": 128},
    "ternary g8": {"bits": "ternary", "group_size": 8},
}


@dataclass(frozen=True)
class Reference:
    """Held-out segments [N, L] and what the unquantised model says of them: log-probabilities [L-1, V] per segment."""

    token_ids_NL: Tensor
    logprobs: list[Tensor]
    perplexity: float


def log_probabilities(decoder: Decoder, ids_L: Tensor) -> Tensor:
    """Next-token log-probabilities [L-1, V] of one segment."""
    return torch.log_softmax(decoder(ids_L[None])[0, :-1], dim=-1)


@torch.no_grad()
def quality(decoder: Decoder, reference: Reference) -> dict[str, float]:
    """Perplexity, its ratio to the reference's, and the mean KL divergence from the reference."""
    loss = divergence = 0.0
    for ids_L, exact_LV in zip(reference.token_ids_NL, reference.logprobs, strict=True):
        logprob_LV = log_probabilities(decoder, ids_L)
        loss -= float(logprob_LV.gather(1, ids_L[1:, None]).mean())
        divergence += float((exact_LV.exp() * (exact_LV - logprob_LV)).sum(-1).mean())
    count = len(reference.token_ids_NL)
    perplexity = math.exp(loss / count)
    return {"perplexity": perplexity, "ratio": perplexity / reference.perplexity, "kl": divergence / count}


def bytes_per_token(decoder: Decoder) -> int:
    """Bytes of weights that one decoded token reads, head included."""
    return sum(layer.weight_bytes() for _, layer in decoder.linears() if isinstance(layer, PackedLinear))


def case(context: BuildContext, technique: GPTQ, reference: Reference) -> dict[str, Any]:
    """Quantise with ``technique`` from scratch; measure it and rounding on its grid."""

    def rounded(source: LinearSource) -> PackedLinear:
        if source.name == "lm_head":
            return pack_head(source, technique.quantize_head)
        return pack_weight(round_to_nearest(source.dense(), technique.grid(), technique.group), source.bias_O)

    with tempfile.TemporaryDirectory(prefix="hasten-gptq-") as folder:
        fresh = replace(context, artefacts=ArtefactStore(Path(folder), context.checkpoint.fingerprint))
        started = time.perf_counter()
        reports = read_reports(technique.prepare(fresh))
        seconds = time.perf_counter() - started
        decoder = load_decoder(context.checkpoint, pack=technique.provide("weight_format", fresh).pack)
    ours = quality(decoder, reference) | {"bytes_per_token": bytes_per_token(decoder)}
    decoder = load_decoder(context.checkpoint, pack=rounded)
    theirs = quality(decoder, reference) | {"bytes_per_token": bytes_per_token(decoder)}
    return {
        "settings": technique.model_dump(mode="json"),
        "gptq": ours,
        "rounding": theirs,
        "quantisation_seconds": seconds,
        "layers": {
            "count": len(reports),
            "better": sum(r["error"] < r["rtn_error"] for r in reports),
            "error": sum(r["error"] for r in reports) / len(reports),
            "rtn_error": sum(r["rtn_error"] for r in reports) / len(reports),
            "each": reports,
        },
    }


@torch.no_grad()
def make_reference(context: BuildContext, samples: int, length: int) -> Reference:
    """Held-out text through the unquantised model."""
    documents = corpus().documents("test")
    token_ids_NL = draw_segments(
        [len(document.text) for document in documents],
        lambda i: context.tokenizer.encode(documents[i].text),
        samples,
        length,
        seed=1,
    )
    decoder = load_decoder(context.checkpoint)
    exact = [log_probabilities(decoder, ids_L) for ids_L in token_ids_NL]
    pairs = zip(exact, token_ids_NL, strict=True)
    loss = -sum(float(e_LV.gather(1, ids_L[1:, None]).mean()) for e_LV, ids_L in pairs) / samples
    return Reference(token_ids_NL, exact, math.exp(loss))


def table(result: dict[str, Any]) -> Table:
    """The result, one row per case."""
    columns = (
        "case",
        "ppl",
        "rounding",
        "KL",
        "rounding",
        "MB/token",
        "layer error",
        "rounding",
        "better",
        "time",
    )
    out = Table(*columns, title=f"unquantised: perplexity {result['reference_perplexity']:.2f}")
    for name, row in result["cases"].items():
        ours, theirs, layers = row["gptq"], row["rounding"], row["layers"]
        out.add_row(
            name,
            f"{ours['ratio']:.3f}x",
            f"{theirs['ratio']:.3f}x",
            f"{ours['kl']:.2e}",
            f"{theirs['kl']:.2e}",
            f"{ours['bytes_per_token'] / 1e6:.1f}",
            f"{layers['error']:.2e}",
            f"{layers['rtn_error']:.2e}",
            f"{layers['better']}/{layers['count']}",
            f"{row['quantisation_seconds']:.0f} s",
        )
    return out


def layer_table(name: str, reports: list[dict[str, Any]]) -> Table:
    """Every linear of a case: the share of its output energy that is lost, beside rounding's, and the time."""
    out = Table("linear", "error", "rounding", "seconds", "dampening", "dead inputs", title=name)
    for r in reports:
        numbers = (f"{r['error']:.2e}", f"{r['rtn_error']:.2e}", f"{r['seconds']:.2f}", f"{r['percdamp']:g}")
        out.add_row(r["name"], *numbers, f"{r['dead']:.0f}")
    return out


def dense_bytes(context: BuildContext) -> dict[str, int]:
    """Bytes per token of the baselines: every linear, head included, in float32 and bfloat16."""
    shapes = context.config.tensor_shapes()
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight"))
    weights += math.prod(shapes.get("lm_head.weight", shapes["embed_tokens.weight"]))
    return {"float32": 4 * weights, "bfloat16": 2 * weights}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--samples", type=int, default=64, help="calibration segments")
    parser.add_argument("--sample-length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=16, help="segments of 512 tokens to evaluate on")
    parser.add_argument("--head", choices=["int8", "bfloat16", "float32"], default="int8")
    parser.add_argument("--layers", action="store_true", help="print error and time of every linear")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    with recording(args.threads, args.json) as result:
        checkpoint = open_checkpoint(resolve(args.model))
        context = BuildContext.of(checkpoint, Path("unused"))
        reference = make_reference(context, args.held_out, 512)
        result |= {
            "model": args.model,
            "held_out_tokens": reference.token_ids_NL.numel(),
            "reference_perplexity": reference.perplexity,
            "dense_bytes_per_token": dense_bytes(context),
            "cases": {},
        }
        common = {"samples": args.samples, "sample_length": args.sample_length, "quantize_head": args.head}
        for name in args.cases:
            row = case(context, GPTQ(**common, **CASES[name]), reference)
            result["cases"][name] = row
            brief = {k: row[k] for k in ("gptq", "rounding", "quantisation_seconds")}
            print(json.dumps({"case": name, **brief}), flush=True)
            if args.layers:
                Console(width=120).print(layer_table(name, row["layers"]["each"]))
    Console(width=120).print(table(result))


if __name__ == "__main__":
    main()
