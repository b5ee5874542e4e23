"""Speed and quality of `token_select` (acceptance 4 and 5 of its specification): `python -m benchmarks.token_select`.

Every arm is a plan of its own on the same texts, with the same prompt chunks: dense attention, StreamingLLM
(the first and
the last tokens, the same total budget, keys at compact positions), and token_select.

``--speed``: seconds until the first token and per further token, arms interleaved in every round; how often
the selection cache was hit. Ratios over dense with their interval; a quiet machine is needed.
``--perplexity``: the last ``--scored`` tokens of texts, read as a prompt is. ``--passkey``: the share of keys found;
contexts beyond the trained length included (``max_context``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recording import recording
from hasten.attention.token_select import TokenSelect
from hasten.core.plan import Plan
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.passkey import passkeys
from hasten.workloads.text import Text


def arms(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Techniques of each arm, dense first."""
    stream = TokenSelect(k=1, n_local=256 + args.k - 1)
    return {
        "dense": [],
        "streaming": [stream],
        "token_select": [TokenSelect(k=args.k, theta=args.theta, scaled=args.scaled)],
    }


def opened(args: argparse.Namespace, use: list[Any], context: int) -> LLM:
    engine = {"kv_tokens": context + 256, "max_context": context + 256, "prefix_cache": False}
    return LLM(Plan.of(use, model=args.model, engine=engine, dtype=args.dtype))


def speed(args: argparse.Namespace, context: int) -> Iterator[dict[str, Any]]:
    """First-token seconds and seconds per further token of every arm, interleaved."""
    loaded = {name: opened(args, use, context) for name, use in arms(args).items()}
    try:
        prompt = Text(loaded["dense"].tokenizer, "test").windows(context, 1)[0]
        params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
        for i in range(args.rounds + 1):
            for name in list(loaded) if i % 2 == 0 else list(loaded)[::-1]:
                timing = loaded[name].generate([prompt], params)[0].timing
                rest = (timing.total - timing.first_token) / max(1, args.tokens - 1)
                found[name].append((timing.first_token, rest))
        for name, llm in loaded.items():
            pairs = list(zip(found["dense"][1:], found[name][1:], strict=True))  # the first round warms up
            yield {
                "context": context,
                "arm": name,
                "prefill": median_interval([dense[0] / ours[0] for dense, ours in pairs]).to_dict(),
                "decode": median_interval([dense[1] / ours[1] for dense, ours in pairs]).to_dict(),
                **{key: value for key, value in llm.facts().items() if key.startswith("selection")},
            }
    finally:
        for llm in loaded.values():
            llm.close()


def perplexity(args: argparse.Namespace, context: int) -> Iterator[dict[str, Any]]:
    dense = 0.0
    for name, use in arms(args).items():
        with opened(args, use, context) as llm:
            total = 0.0
            texts = Text(llm.tokenizer, "test").windows(context, args.texts)
            for ids in texts:
                logprobs = llm.score(ids, context=context - args.scored, mode=args.mode).logprobs
                total -= sum(logprobs) / len(logprobs) / len(texts)
        dense = total if name == "dense" else dense
        yield {
            "context": context,
            "arm": name,
            "mode": args.mode,
            "loss": total,
            "change": math.expm1(total - dense),
        }


def passkey(args: argparse.Namespace, context: int) -> Iterator[dict[str, Any]]:
    params = SamplingParams(max_tokens=8, temperature=0)
    for name, use in arms(args).items():
        with opened(args, use, context) as llm:
            prompts = passkeys(llm.tokenizer, context, texts=args.texts)
            found = [p.found_in(llm.generate([list(p.token_ids)], params)[0].text) for p in prompts]
        yield {"context": context, "arm": name, "found": sum(found), "asked": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in ("speed", "perplexity", "passkey"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--context", type=int, nargs="+", default=[8192])
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--theta", type=float, default=0.9)
    parser.add_argument("--scaled", action="store_true")
    parser.add_argument("--tokens", type=int, default=64, help="generated, of --speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--mode", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto", help="bfloat16: with 16-bit weights")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    parts = {"speed": speed, "perplexity": perplexity, "passkey": passkey}
    wanted = [name for name in parts if getattr(args, name)]
    if not wanted:
        parser.error("nothing to measure: give --speed, --perplexity or --passkey")
    with recording(args.threads, args.json) as result:
        for name in wanted:
            result[name] = []
            for context in args.context:
                for record in parts[name](args, context):
                    result[name].append(record)
                    print(json.dumps({"part": name, **record}), flush=True)


if __name__ == "__main__":
    main()
