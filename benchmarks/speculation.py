"""Plain decoding, prompt lookup and a draft model side by side: `python -m benchmarks.speculation --json FILE`.

One loaded target; the drafter is switched between runs, so all arms use the same weights, pages and threads. Rounds run
every arm on every prompt, forwards and backwards in turn; a ratio is that of the decoding times (first to last token)
of a round. Greedy, so all arms must give the same tokens: equal answers are counted. Two kinds of prompt: ``edit``
(workload `edit`: the answer repeats its input) and ``text`` (a page of a manual to go on with). ``--rows`` also prints
what a step of 1 to 9 rows costs: the price of a verified guess.

The defaults, Qwen2.5-Coder 1.5B drafted by 0.5B, are opt-in: `hasten models pull NAME` fetches them. A quiet machine is
part of the measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hasten.core.artefact import ArtefactStore
from hasten.core.plan import Plan
from hasten.lm.build import Loaded
from hasten.lm.chunk import Chunk
from hasten.lm.decoding.draft_model import DraftModel
from hasten.lm.decoding.prompt_lookup import PromptLookup
from hasten.lm.decoding.speculate import Drafter
from hasten.lm.request import Speculation
from hasten.measure.environment import BusyMonitor, machine, usable_cpus
from hasten.measure.statistics import MIN_PAIRS, median_interval
from hasten.models.context import BuildContext
from hasten.workloads.edit import EditOptions, EditSession
from hasten.workloads.language import generate

ARMS = ("plain", "prompt_lookup", "draft_model")
KINDS = ("edit", "text")


class Bench:
    """The target with its drafters, and the prompts of each kind."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        options = EditOptions(passages=arguments.prompts, passage_tokens=arguments.prompt_tokens)
        plan = Plan(model=arguments.model, engine={"max_batch": 4, "max_context": 2048})
        self.session, self.tokens = EditSession(plan, options), arguments.tokens
        self.llm = self.session.llm
        self.prompts = {
            "edit": self.session.prompts,
            "text": self.session.text.windows(arguments.prompt_tokens, arguments.prompts, skip=100),
        }
        self.drafters: dict[str, Drafter | None] = {"plain": None}
        engine, context = self.llm.engine, _context(self.llm._loaded)
        adaptive = not arguments.fixed
        for technique in (
            PromptLookup(draft_tokens=arguments.lookup_tokens, adaptive=adaptive),
            DraftModel(model=arguments.draft, draft_tokens=arguments.draft_tokens, adaptive=adaptive),
        ):
            if technique.slug in arguments.arms:
                drafter = technique.provide("drafter", context)
                drafter.bind(engine.cache, engine.settings)
                self.drafters[technique.slug] = drafter

    def run(self, arm: str, kind: str) -> tuple[float, list[tuple[int, ...]], Speculation]:
        """(decoding seconds, answers, what drafting did) of one arm over all prompts of a kind."""
        engine = self.llm.engine
        engine.parts.drafter = self.drafters[arm]
        seconds, answers, before = 0.0, [], engine.speculation
        for prompt in self.prompts[kind]:
            self.llm.forget_prefixes()
            done = generate(self.llm, [prompt], self.tokens)[0]
            seconds += done.timing.total - done.timing.first_token
            answers.append(done.token_ids)
        return seconds, answers, engine.speculation - before

    def kind(self, kind: str, rounds: int) -> dict[str, Any]:
        """All arms on the prompts of one kind."""
        seconds: dict[str, list[float]] = {arm: [] for arm in self.drafters}
        done = {arm: Speculation() for arm in self.drafters}
        same = dict.fromkeys(self.drafters, 0)
        for i in range(rounds + 1):
            answers = {}
            for arm in list(self.drafters) if i % 2 == 0 else list(self.drafters)[::-1]:
                spent, answers[arm], drafts = self.run(arm, kind)
                if i > 0:  # the first round warms up
                    seconds[arm].append(spent)
                    done[arm] += drafts
            for arm, tokens in answers.items():
                same[arm] += sum(a == b for a, b in zip(tokens, answers["plain"], strict=True)) if i else 0
        prompts = len(self.prompts[kind])
        units = prompts * (self.tokens - 1)
        return {
            arm: {
                "tokens_per_second": units / statistics.median(seconds[arm]),
                "speedup": _speedup(seconds["plain"], seconds[arm]),
                "same_answers": f"{same[arm]} of {rounds * prompts}",
                **done[arm].to_dict(),
            }
            for arm in self.drafters
        }

    def rows(self, counts: Sequence[int], repeat: int) -> dict[int, float]:
        """Milliseconds of a step of so many rows at the end of 256 tokens: the least of ``repeat``."""
        cache, runner = self.llm.engine.cache, self.llm.engine.runner
        kv = cache.open(self.llm.engine.new_id())
        cache.attach(kv)
        ids = self.session.text.windows(256 + max(counts), 1)[0]
        cache.reserve(kv, 0, len(ids))
        runner.run([Chunk(kv, 0, ids[:256], range(256), 1)])
        best = dict.fromkeys(counts, float("inf"))
        for _ in range(repeat):
            for count in counts:
                kv.length = 256
                chunk = Chunk(kv, 256, ids[256 : 256 + count], range(256, 256 + count), count)
                begin = time.perf_counter()
                runner.run([chunk])
                best[count] = min(best[count], 1e3 * (time.perf_counter() - begin))
        cache.close(kv)
        return best


def _context(loaded: Loaded) -> BuildContext:
    """What drafters see of the target, which is loaded with ``dtype = auto``."""
    return BuildContext(
        config=loaded.checkpoint.config,
        checkpoint=loaded.checkpoint,
        tokenizer=loaded.tokenizer,
        weight_dtype=None,
        kv_dtype=torch.bfloat16,
        artefacts=ArtefactStore(Path("unused"), "unused"),
    )


def _speedup(plain: Sequence[float], arm: Sequence[float]) -> dict[str, Any]:
    ratios = [p / a for p, a in zip(plain, arm, strict=True)]
    if len(ratios) < MIN_PAIRS:  # too few for an interval
        return {"median": statistics.median(ratios), "pairs": len(ratios)}
    return median_interval(ratios).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate for each")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--lookup-tokens", type=int, default=8)
    parser.add_argument("--fixed", action="store_true", help="always draft as many tokens as allowed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", action="store_true", help="also time steps of 1 to 9 rows")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
        "machine": machine(arguments.threads, usable_cpus()).to_dict(),
    }
    busy = BusyMonitor()
    busy.start()
    if arguments.rows:
        result["step_ms_by_rows"] = bench.rows(range(1, 10), 5)
        print({rows: round(ms, 1) for rows, ms in result["step_ms_by_rows"].items()})
    for kind in arguments.kinds:
        result[kind] = bench.kind(kind, arguments.rounds)
        for arm, row in result[kind].items():
            speed = row["speedup"]
            span = f" [{speed['low']:.2f}, {speed['high']:.2f}]" if "low" in speed else ""
            print(
                f"{kind:5} {arm:14} {row['tokens_per_second']:7.1f} tokens/s  {speed['median']:.2f}x{span}  "
                f"acceptance length {row['acceptance_length']:.2f}  same answers {row['same_answers']}",
                flush=True,
            )
    result["busy"] = busy.stop().to_dict()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
