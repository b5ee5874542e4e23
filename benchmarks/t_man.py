"""Speed and quality of `t_man`: `python -m benchmarks.t_man --parts layers quality --json FILE`.

``layers``: one layer's product by table look-up (int16 and int8 tables) against dequantising every call and multiplying
(``tables, dense``: the path for many rows, and the paper's baseline at one), the engine's kernels on the same codes
(``affine``: int16 activations where they exist, ``float32``) and pre-packed bfloat16. Paired, interleaved.

``quality``: perplexity of GPTQ at 3 and 2 bits on planes, for both tables, over the unquantised model's, through the
decode path; and of the same codes on the engine's float32 kernels, which shows what the tables alone cost.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recording import recording
from hasten.core.plan import Plan
from hasten.kernels.t_man import multiply
from hasten.lm.llm import LLM
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.weights.affine import AffineLinear, round_to_nearest
from hasten.weights.dense import DenseLinear
from hasten.weights.gptq import GPTQ
from hasten.weights.t_man import PlaneLinear, TMan
from hasten.workloads.text import Text

SHAPES = {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536), "large": (4096, 4096)}


def arms_of(outputs: int, inputs: int, bits: int, group: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to multiply by one weight of random codes."""
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.05
    codes_OI, scale_OG, low_OG = round_to_nearest(weight_OI, bits, group)
    exact = AffineLinear(codes_OI, scale_OG, low_OG, bits=bits, group_size=group)
    rounded = AffineLinear(
        codes_OI,
        scale_OG,
        low_OG,
        bits=bits,
        group_size=group,
        activations="int16" if bits >= 4 else "float32",
    )
    wide, narrow = PlaneLinear.of(exact), PlaneLinear.of(exact, "int8")
    bf16 = DenseLinear(weight_OI, None, torch.bfloat16)
    return {
        "look-up int16": lambda x: multiply(wide.kernel(), x, "lookup"),
        "look-up int8": lambda x: multiply(narrow.kernel(), x, "lookup"),
        "tables, dense": lambda x: multiply(wide.kernel(), x, "dequantize"),
        "as chosen": wide,
        "affine": rounded,
        "affine float32": exact,
        "bfloat16": bf16,
    }


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """Per shape, bits and rows: median microseconds of every arm, and its ratio over the baselines."""
    out: dict[str, Any] = {}
    for name in options.shapes:
        for bits in options.bits:
            arms = arms_of(*SHAPES[name], bits, options.group)
            for rows in options.rows:
                x_TI = torch.randn(rows, SHAPES[name][1])
                seconds: dict[str, list[float]] = {arm: [] for arm in arms}
                for _ in range(options.rounds + 1):
                    for arm, multiply_by in arms.items():
                        started = time.perf_counter()
                        multiply_by(x_TI)
                        seconds[arm].append(time.perf_counter() - started)
                seconds = {arm: values[1:] for arm, values in seconds.items()}
                ours = seconds["as chosen"]
                row = {
                    "median_us": {arm: 1e6 * statistics.median(v) for arm, v in seconds.items()},
                    "speed_over": {
                        arm: median_interval([b / a for a, b in zip(ours, values, strict=True)]).to_dict()
                        for arm, values in seconds.items()
                        if arm in ("affine", "affine float32", "tables, dense", "bfloat16")
                    },
                }
                out[f"{name} {bits} bits {rows} rows"] = row
                print(name, bits, rows, {k: round(v) for k, v in row["median_us"].items()}, flush=True)
    return out


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity by plan, of the same windows of the test split."""
    common: dict[str, Any] = {
        "group_size": options.group,
        "samples": options.samples,
        "sample_length": options.sample_length,
    }
    plans: dict[str, Plan] = {"float32": Plan(options.model, dtype="float32")}
    for bits in (3, 2):
        plans[f"{bits} bits, float32 kernels"] = Plan(options.model, (GPTQ(bits=bits, **common),))
        for tables in ("int16", "int8"):
            use = TMan(bits=bits, tables=tables, **common)
            plans[f"{bits} bits, {tables} tables"] = Plan(options.model, (use,))
    out: dict[str, Any] = {}
    for name, plan in plans.items():
        with LLM(plan, max_batch=1) as llm:
            windows = Text(llm.tokenizer, "test").windows(options.length, options.windows)
            scores = llm.score(windows, context=1, mode="decode")
        values = [value for score in scores for value in score.logprobs]
        out[name] = math.exp(-sum(values) / len(values))
        print(name, f"perplexity {out[name]:.3f}, {out[name] / out['float32']:.4f}x", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = partial(parser.add_argument, nargs="+", type=int)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--parts", nargs="+", choices=["layers", "quality"], default=["layers"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    whole("--bits", default=[4, 3, 2])
    whole("--rows", default=[1, 4, 16, 128, 512])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="documentation-14m")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sample-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    with recording(options.threads, options.json) as result, torch.no_grad():
        for part, run in (("layers", layers), ("quality", quality)):
            if part in options.parts:
                result[part] = run(options)


if __name__ == "__main__":
    main()
