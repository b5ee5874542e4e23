"""Speed and quality of `quantspec` (acceptance 1, 3 and 5 of its specification): `python -m benchmarks.quantspec
--json FILE`.

``--attention``: one layer's attention of one row and of a verified block over a long context: bfloat16 pages, the
draft's plane, both planes. Same lengths, paired and interleaved.

``--decode``: arms that decode the same prompts, one at a time, interleaved; the ratio to the first, with its interval.

| arm | weights | cache | | --- | --- | --- | | A | bfloat16 | bfloat16 | | B | bfloat16 | 8 bits (the reference of
what quantspec answers) | | C | 4-bit codes of the checkpoint | 4 bits: fast, and another answer | | D | as
quantspec, but the draft reads sink and window: as many bytes, in half of the pages | 8 bits | | E | 4-bit codes of
the checkpoint | 8 bits | | quantspec, -rtn | bfloat16, drafted by the checkpoint's codes, or by bfloat16 rounded to
4 bits | 8 bits, drafted with 4 |

``--quality``: perplexity by cache (bfloat16, 8 bits, 4 bits) on windows of held-out documents.

``--identity``: greedy answers of quantspec and of B on many prompts: equal, or where they part and by how little B's
logits differ there. ``--acceptance``: the share of guesses kept at temperature 1, of quantspec, of rtn and of D.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adamas import interleaved
from benchmarks.hydragen import decode_layout, random_pages
from benchmarks.recording import record, recording
from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense, Selection
from hasten.core.plan import Plan
from hasten.kernels.quantspec import Planes, Tails, quantspec_attend, quantspec_pack
from hasten.lm.decoding.quantspec import QuantSpec
from hasten.lm.kvcache.quantspec import QuantSpecKernel, QuantSpecKV, QuantSpecPages, Step
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.language import perplexity
from hasten.workloads.text import Text

SHAPE = HeadShape(9, 3, 64)
PAGE = 128
ARMS = ("A", "B", "C", "D", "E", "quantspec", "quantspec-rtn")


class SinkWindowKernel(QuantSpecKernel):
    """A draft that reads the first page and the newest ones, half of the pages, both planes: the bytes of all upper
    planes.

    Rotated keys carry their positions, so leaving pages out is a shorter table, and rows and tail moved up by as much.
    """

    def run(
        self, plan: Step, layer: int, q_THD: Tensor, pages: Any, layout: StepLayout, spec: AttentionSpec,
        selection: Selection, observe: Any = None,
    ) -> Tensor:  # fmt: skip
        size = self.format.page_size
        bound_T = plan.bound_T.clone()
        table_SM = plan.table_SM.clone()
        position_S = plan.position_S.clone()
        base = list(pages.tails.base)
        for s, (first, last) in enumerate(
            zip(layout.query_start_S1[:-1].tolist(), layout.query_start_S1[1:].tolist(), strict=True)
        ):
            most = int(bound_T[last - 1])
            left_out = most - max(1, most // 2) if most else 0
            if left_out:
                table_SM[s, 1 : most - left_out] = plan.table_SM[s, 1 + left_out : most]
                bound_T[first:last] = (bound_T[first:last] - left_out).clamp_min(0)
                position_S[s] -= left_out * size
                base[s] -= left_out * size
        moved = QuantSpecPages(pages.planes, replace(pages.tails, base=tuple(base)))
        plan = replace(plan, bound_T=bound_T, table_SM=table_SM, position_S=position_S)
        return super().run(plan, layer, q_THD, moved, layout, spec, selection)


def arm(name: str, model: str, context: int, tokens: int) -> LLM:
    """The engine of an arm, with room for one sequence."""
    dtype = "auto" if name in ("C", "E") else "bfloat16"
    use: tuple[QuantSpec, ...] = ()
    if name != "A":
        drafts = name in ("D", "quantspec", "quantspec-rtn")
        weights = "rtn" if name.endswith("rtn") else "native"
        # Fewer guesses pay where verification rows read a long context.
        guesses = 4 if context <= 1024 else 2
        use = (QuantSpec(draft=drafts, draft_weights=weights, draft_tokens=guesses),)
    engine = {"max_batch": 1, "kv_tokens": context + tokens + 3 * PAGE}
    llm = LLM(Plan(model, use, dtype, engine))
    format = llm.engine.cache.format
    if name == "C":
        assert isinstance(format, QuantSpecKV)
        llm.engine.runner.kernel = QuantSpecKernel(format, full=False)
    if name == "D":
        assert isinstance(format, QuantSpecKV)
        llm.engine.parts.drafter.runner.kernel = SinkWindowKernel(format, full=True)  # type: ignore[union-attr]
    return llm


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def attention_case(context: int, rows: int, rounds: int) -> dict[str, Any]:
    pages, spec, kernel = context // PAGE, AttentionSpec(SHAPE, SHAPE.size**-0.5), DenseKernel()
    planes = Planes.empty(pages, SHAPE.kv_heads, PAGE, SHAPE.size)
    numbers = torch.randn(2, pages, PAGE, SHAPE.kv_heads, SHAPE.size)
    quantspec_pack(numbers[0], numbers[1], torch.randperm(pages), planes)
    ring = torch.randn(2, 3 * PAGE, SHAPE.kv_heads, SHAPE.size).bfloat16()
    row = torch.arange(context - rows, context)
    start = torch.tensor([0, rows], dtype=torch.int32)
    bound, table = ((row + 1) // PAGE - 1).int(), torch.arange(pages, dtype=torch.int32)[None]
    q = torch.randn(rows, SHAPE.heads, SHAPE.size)
    tails = Tails((ring[0],), (ring[1],), (0,))
    plain = random_pages(context // 32, SHAPE, torch.bfloat16)
    layout = decode_layout([torch.randperm(context // 32).tolist()])
    layout = replace(
        layout, query_start_S1=start, position_T=row, slot_T=torch.zeros(rows, dtype=torch.int64)
    )
    plan = kernel.plan(layout)

    def planes_read(full: bool) -> None:
        quantspec_attend(q, planes, tails, start, row[:1], bound, table, spec.scale, full=full)

    seconds = interleaved(
        {
            "bfloat16": partial(kernel.run, plan, 0, q, plain, layout, spec, Dense()),
            "upper": partial(planes_read, False),
            "both": partial(planes_read, True),
        },
        rounds,
    )
    ratios = {
        name: median_interval(
            [a / b for a, b in zip(seconds["bfloat16"], seconds[name], strict=True)]
        ).to_dict()
        for name in ("upper", "both")
    }
    return {"context": context, "rows": rows, "speedup_over_bfloat16": ratios}


def decode(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for context in args.context:
        engines = {name: arm(name, args.model, context, args.tokens) for name in args.arms}
        text = Text(next(iter(engines.values())).tokenizer)
        prompt = text.windows(context - args.tokens, 1)[0]
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        answers: dict[str, tuple[int, ...]] = {}
        for i in range(args.rounds + 1):
            for name in list(engines) if i % 2 == 0 else list(engines)[::-1]:
                done = engines[name].generate([prompt], greedy(args.tokens))[0]
                if i:  # the first round reads the prompts
                    seconds[name].append((done.timing.total - done.timing.first_token) / (args.tokens - 1))
                answers[name] = tuple(done.token_ids)
        for name, llm in engines.items():
            cache, drafter, total = llm.engine.cache, llm.engine.parts.drafter, llm.engine.speculation
            record: dict[str, Any] = {
                "context": context,
                "arm": name,
                "ms_per_token": 1e3 * sorted(seconds[name])[len(seconds[name]) // 2],
                "page_bytes_per_token": cache.page_bytes / cache.page_size,
                "equals_B": answers[name] == answers["B"] if "B" in answers else None,
            }
            if name != args.arms[0]:
                pairs = zip(seconds[args.arms[0]], seconds[name], strict=True)
                record["ratio"] = median_interval([a / b for a, b in pairs]).to_dict()
            if total.rounds:
                record |= {
                    "acceptance": total.accepted / total.drafted,
                    "tokens_per_round": total.accepted / total.rounds + 1,
                    "draft_seconds_per_round": drafter.seconds / total.rounds,  # type: ignore[union-attr]
                }
            yield record
            llm.close()


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    scored, found = args.length - args.scored, {}
    for name in ("A", "B", "four bits"):
        llm = arm("B" if name == "four bits" else name, args.model, args.length, 1)
        if name == "four bits":
            llm.engine.runner.kernel = QuantSpecKernel(llm.engine.cache.format, full=False)  # type: ignore[arg-type]
        windows = Text(llm.tokenizer).windows(args.length, args.windows)
        found[name] = perplexity(llm.score(windows, context=scored))
        llm.close()
        yield {"cache": name, "perplexity": found[name], "over_bfloat16": found[name] / found["A"] - 1}


def identity(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    mine, own = (arm(name, args.model, args.length, args.tokens) for name in ("quantspec", "B"))
    prompts = Text(own.tokenizer).windows(args.length - args.tokens, args.windows)
    for number, prompt in enumerate(prompts):
        a, b = (tuple(llm.generate([prompt], greedy(args.tokens))[0].token_ids) for llm in (mine, own))
        record: dict[str, Any] = {"prompt": number, "equal": a == b}
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=2)
            top = own.generate([[*prompt, *b[:at]]], params)[0].samples[0].logprobs[0].top
            values = sorted(top.values(), reverse=True)
            record |= {"first_difference": at, "gap": values[0] - values[1] if len(values) > 1 else math.nan}
        yield record


def acceptance(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in ("quantspec", "quantspec-rtn", "D"):
        llm = arm(name, args.model, args.length, args.tokens)
        prompts = Text(llm.tokenizer).windows(args.length - args.tokens, args.windows)
        llm.generate(
            prompts, SamplingParams(max_tokens=args.tokens, ignore_eos=True, seed=0, temperature=1.0)
        )
        done = llm.engine.speculation
        # Of a round with k guesses, those after the first rejection were not judged.
        yield {
            "arm": name,
            "length": args.length,
            "kept": done.accepted / done.drafted,
            "rounds": done.rounds,
        }
        llm.close()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "decode": decode,
    "quality": quality,
    "identity": identity,
    "acceptance": acceptance,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--attention", action="store_true", help="one layer's attention")
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="to generate")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--scored", type=int, default=1024, help="tokens scored at its end")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    args = parser.parse_args()
    if not args.attention and not any(getattr(args, name) for name in PARTS):
        parser.error("nothing to measure: give --attention, --decode, --quality, --identity or --acceptance")
    with recording(args.threads, args.json) as result:
        if args.attention:
            result["attention"] = []
            for context in args.context:
                for rows in (1, 3):
                    with torch.inference_mode():
                        result["attention"].append(attention_case(context, rows, args.rounds))
                    print(json.dumps(result["attention"][-1]), flush=True)
        for name, run in PARTS.items():
            if getattr(args, name):
                record(result, name, run(args))


if __name__ == "__main__":
    main()
