"""Speed and quality of `ape` (acceptance 3, 4 and 5 of its specification): `python -m benchmarks.ape --json FILE`.

``--speed``: time to the first token and to the last of one question about ``--passages`` passages, given in a new order
every time. Arms: sequential encoding cold, sequential with the ordinary prefix cache, ape with every passage encoded
before. Paired and interleaved; run it on a quiet machine. Encoding the passages is timed apart: ``break_even`` says
after how many questions it has paid.

``--quality``: the right answer's loss, exact match and F1, and the divergence of the answer's token distributions from
sequential encoding; arms plain parallel encoding, with the shared prefix, and ape with T and S as set and as tuned. T,
then S, are tuned on questions of the validation split, judged on those of the test split.

``--long``: more passages than the model's window holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.recording import record, recording
from hasten.core.plan import Plan
from hasten.lm.context.ape import APE, ParallelContexts
from hasten.lm.llm import LLM
from hasten.lm.scoring import answer_logprobs
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.corpus import Split
from hasten.workloads.document_qa import Passage, Question, library, question
from hasten.workloads.language import greedy

PLAIN = APE(temperature=1, scale=1, shared_prefix=False)
PREFIX = APE(temperature=1, scale=1)
GRID = (1.0, 0.9, 0.8, 0.7)


def store_of(llm: LLM) -> Any:
    (transform,) = llm.engine.parts.transforms
    assert isinstance(transform, ParallelContexts)
    return transform.store


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    slots = args.library * (args.passage_tokens + 64) + 2 * args.passages * (args.passage_tokens + 64) + 2048
    return {"max_batch": 4, "max_context": 8192, "kv_tokens": 2 * slots}


# -- speed --------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Median ratios of times, ape's against both sequential arms."""
    settings = engine_settings(args)
    arms = {
        "cold": LLM(Plan(args.model, (), dtype, {**settings, "prefix_cache": False})),
        "cached": LLM(Plan(args.model, (), dtype, settings)),
        "ape": LLM(Plan(args.model, (APE(),), dtype, settings)),
    }
    passages = library(arms["ape"].tokenizer, args.library, args.passage_tokens)
    began = time.perf_counter()
    encode(arms["ape"], passages, args.passages)
    encoding = (time.perf_counter() - began) * args.passages / args.library
    first: dict[str, list[float]] = {name: [] for name in arms}
    total: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds + 1):
        asked = question(passages, turn % args.library, args.passages, "speed", turn)
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            done = arms[name].generate([asked.prompt(arms[name])], greedy(args.tokens))[0]
            first[name].append(done.timing.first_token)
            total[name].append(done.timing.total)
    out: dict[str, Any] = {
        "dtype": dtype,
        "context_tokens": args.passages * args.passage_tokens,
        "tokens": args.tokens,
        "encoding_seconds_of_a_question": encoding,
        "store_bytes": store_of(arms["ape"]).bytes(),
    }
    for name in ("cold", "cached"):
        for what, times in (("first_token", first), ("total", total)):
            pairs = [b / a for b, a in zip(times[name][1:], times["ape"][1:], strict=True)]
            out[f"{what}_over_{name}"] = median_interval(pairs).to_dict()
    saved = statistics.median(total["cold"][1:]) - statistics.median(total["ape"][1:])
    out["break_even"] = encoding / saved if saved > 0 else None
    out["median_seconds"] = {
        name: [statistics.median(first[name][1:]), statistics.median(total[name][1:])] for name in arms
    }
    for llm in arms.values():
        llm.close()
    return out


def encode(llm: LLM, passages: Sequence[Passage], at_once: int) -> None:
    """Have every passage read."""
    for start in range(0, len(passages), at_once):
        llm.generate([Question(tuple(passages[start : start + at_once]), 0).prompt(llm)], greedy(1))


# -- quality ------------------------------------------------------------------------------------------------------


def questions(llm: LLM, args: argparse.Namespace, split: Split) -> list[Question]:
    passages = library(llm.tokenizer, args.library, args.passage_tokens, split)
    return [
        question(passages, i % args.library, args.passages, "quality", split, i)
        for i in range(args.questions)
    ]


def judged(llm: LLM, asked: Question) -> tuple[dict[str, float], Tensor]:
    """exact, f1 and loss of one question; and the answer's token distributions, float32 [A, V]."""
    prompt = asked.prompt(llm)
    ids = llm.tokenizer.encode(f" {asked.passage.answer}")
    logprob_AV = answer_logprobs(llm.engine, prompt, ids)
    text = generate_text(llm, asked)
    loss = -float(logprob_AV[range(len(ids)), ids].mean())
    return {"exact": float(asked.exact(text)), "f1": asked.f1(text), "loss": loss}, logprob_AV


def generate_text(llm: LLM, asked: Question) -> str:
    return llm.generate([asked.prompt(llm)], greedy(12))[0].text


def arm(
    args: argparse.Namespace, use: Sequence[APE], split: Split, reference: list[Tensor]
) -> dict[str, Any]:
    """Means over the split's questions, with the standard error of the divergence."""
    llm = LLM(Plan(args.model, tuple(use), "auto", engine_settings(args)))
    rows: list[dict[str, float]] = []
    for number, asked in enumerate(questions(llm, args, split)):
        row, logprob_AV = judged(llm, asked)
        if use:
            true_AV = reference[number]
            row["kl"] = float((true_AV.exp() * (true_AV - logprob_AV)).sum(-1).mean())
        else:
            reference.append(logprob_AV)
        rows.append(row)
    llm.close()
    out: dict[str, Any] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    if use and len(rows) > 1:
        out["kl_error"] = statistics.stdev(row["kl"] for row in rows) / len(rows) ** 0.5
    return out


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    validation: list[Tensor] = []
    arm(args, (), "validation", validation)
    tried: dict[tuple[float, float], float] = {}

    def divergence(t: float, s: float) -> float:
        if (t, s) not in tried:
            use = (APE(temperature=t, scale=s),)
            tried[t, s] = arm(args, use, "validation", validation)["kl"]
        return tried[t, s]

    temperature = min(GRID, key=lambda t: divergence(t, 1.0))
    scale = min(GRID, key=lambda s: divergence(temperature, s))
    yield {"arm": "tuned on validation", "temperature": temperature, "scale": scale}
    reference: list[Tensor] = []
    yield {"arm": "sequential", **arm(args, (), "test", reference)}
    arms = {
        "plain parallel": PLAIN,
        "shared prefix": PREFIX,
        "ape": APE(),
        "ape tuned": APE(temperature=temperature, scale=scale),
    }
    for name, use in arms.items():
        yield {"arm": name, **arm(args, (use,), "test", reference)}


def beyond(args: argparse.Namespace) -> dict[str, Any]:
    """40 passages of 512 tokens: more than the default model's window of 8,192 positions."""
    engine = {"max_batch": 2, "max_context": 24_000, "kv_tokens": 60_000}
    llm = LLM(Plan(args.model, (APE(store_mb=1e6),), "auto", engine))
    passages = library(llm.tokenizer, 40, 512)
    rows = [judged(llm, question(passages, i, 40, "long", i))[0] for i in range(min(args.questions, 40))]
    llm.close()
    return {"context_tokens": 40 * 512, **{key: statistics.fmean(r[key] for r in rows) for key in rows[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", default=["auto", "bfloat16", "float32"], help="of --speed")
    parser.add_argument("--library", type=int, default=12, help="passages in all (at most 40)")
    parser.add_argument("--passages", type=int, default=10, help="passages of a question")
    parser.add_argument("--passage-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to answer, of --speed")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--questions", type=int, default=24, help="of --quality and --long")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    if not (args.speed or args.quality or args.long):
        parser.error("nothing to measure: give --speed, --quality or --long")
    with recording(args.threads, args.json) as result:
        if args.speed:
            result["speed"] = []
            for dtype in args.dtype:
                result["speed"].append(speed(args, dtype))
                print(json.dumps(result["speed"][-1]), flush=True)
        if args.quality:
            record(result, "quality", quality(args))
        if args.long:
            result["long"] = beyond(args)
            print(json.dumps(result["long"]), flush=True)


if __name__ == "__main__":
    main()
