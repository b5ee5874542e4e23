"""Depth pruning by `sleb` on real text: `python -m benchmarks.sleb --quality --speed --json FILE`.

``--quality`` (acceptance 3 of the specification): per criterion, number of removals and draw of the calibration text
the blocks in the order of their removal, the loss on the calibration text, and held-out perplexity over the whole
model's. Searches are kept as artefacts and not made again; the first time they take half an hour on two quiet cores.

``--sensitivity``: SLEB with fewer and more calibration tokens, on the same held-out text.

``--analysis``: how alike the hidden states around each block are, and what each block is missed by in the whole model
and once the first block is gone: redundancy depends on what was removed before.

``--speed`` (acceptance 4): the `decode` and `prefill` workloads, pruned against whole, paired and interleaved in one
process, beside what the cost model predicts from a run of the whole model: all but the time in blocks is fixed. Needs
a quiet machine. For a model whose head is most of its weights: ``--model gemma-3-270m --remove 2 4``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recording import chosen, record, recording
from hasten import workloads
from hasten.core import paths
from hasten.core.plan import Plan
from hasten.lm.layers.sleb import SLEB, Removal, Search
from hasten.lm.llm import LLM
from hasten.lm.native import NativeStack
from hasten.measure.environment import usable_cpus
from hasten.measure.interleave import measure_pairs, warm_up
from hasten.measure.statistics import Stopping
from hasten.models.checkpoint import open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.store import resolve
from hasten.workloads.language import LanguageSession, perplexity
from hasten.workloads.text import Text

CRITERIA = ("sleb", "one_shot", "cosine", "random", "last")
JOBS: dict[str, dict[str, Any]] = {"decode": {"reference": False}, "prefill": {"reference": False}}
SENSITIVITY = {"1k": (4, 256), "2k": (8, 256), "2k long": (4, 512), "8k": (32, 256)}


def context_of(model: str) -> BuildContext:
    """The model with its artefacts where the engine keeps them."""
    checkpoint = open_checkpoint(resolve(model))
    return BuildContext.of(checkpoint, paths.home() / "artefacts", kv_dtype=torch.bfloat16)


# -- quality ------------------------------------------------------------------------------------------------------


class HeldOut:
    """Perplexity on windows of the test split, over the whole model's."""

    def __init__(self, context: BuildContext, model: str, windows: int) -> None:
        self.context, self.model = context, model
        self.windows = Text(context.tokenizer, "test").windows(512, windows)
        self._known: dict[frozenset[int], float] = {}
        self.whole = self._perplexity(SLEB(remove=0))

    def ratio(self, technique: SLEB) -> float:
        return self._perplexity(technique) / self.whole

    def _perplexity(self, technique: SLEB) -> float:
        blocks = frozenset(technique.removal(self.context).blocks)  # in another order it is the same model
        if blocks not in self._known:
            with LLM(Plan(self.model, (technique,)), max_batch=1) as llm:
                self._known[blocks] = perplexity(llm.score(self.windows))
        return self._known[blocks]


def found(technique: SLEB, held_out: HeldOut) -> dict[str, Any]:
    """One search and what it is worth."""
    started = time.perf_counter()
    was_known = technique.known(held_out.context) is not None
    removal: Removal = technique.removal(held_out.context)
    seconds = None if was_known else round(time.perf_counter() - started, 1)
    return {
        "technique": technique.label(),
        **asdict(removal),
        "held_out": held_out.ratio(technique),
        "search_seconds": seconds,
    }


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per search, then means over draws."""
    held_out = HeldOut(context_of(args.model), args.model, args.windows)
    yield {"whole": held_out.whole, "held_out_tokens": sum(map(len, held_out.windows))}
    for count in args.remove:
        for criterion in args.criteria:
            ratios, losses = [], []
            for draw in range(args.draws):
                record = found(
                    SLEB(criterion=criterion, remove=count, seed=draw, samples=args.samples), held_out
                )
                ratios.append(record["held_out"])
                losses.append(record["losses"][-1] - record["losses"][0])
                yield record
            yield {
                "criterion": criterion,
                "remove": count,
                "held_out_mean": statistics.fmean(ratios),
                "held_out_range": [min(ratios), max(ratios)],
                "calibration_loss_rise": statistics.fmean(losses),
            }


def sensitivity(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """SLEB by amount of calibration text."""
    held_out = HeldOut(context_of(args.model), args.model, args.windows)
    for name, (samples, length) in SENSITIVITY.items():
        technique = SLEB(remove=max(args.remove), samples=samples, sample_length=length)
        yield {"calibration": name, **found(technique, held_out)}


def analysis(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Similarity around each block; what a block is missed by, before and after the first removal."""
    search = Search(SLEB(), context_of(args.model))
    near_BB: Tensor = search.measured.similarity()
    whole = search.table(())
    first = whole.best()
    after = search.table((first,))
    both = sorted(after.without)
    for block in sorted(whole.without):
        yield {
            "block": block,
            "cosine": float(near_BB[block, block + 1]),
            "missed_by": whole.without[block] - whole.loss,
            "missed_by_after": None if block == first else after.without[block] - after.loss,
        }
    before = [whole.without[block] for block in both]
    yield {
        "first": first,
        "rank_correlation_before_after": rank_correlation(before, [after.without[b] for b in both]),
        "rank_correlation_cosine_loss": rank_correlation([-float(near_BB[b, b + 1]) for b in both], before),
    }


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: the correlation of ranks (values are distinct)."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


# -- speed --------------------------------------------------------------------------------------------------------


class TimedStack:
    """Stands for the native stack of a runner and adds up the seconds spent in it on steps that ``counts`` admits."""

    def __init__(self, stack: Any, counts: Callable[[int], bool]) -> None:
        self.stack, self.counts = stack, counts
        self.seconds = 0.0

    def step(self, x_TE: Tensor, *rest: Any) -> None:
        """One step of all blocks."""
        began = time.perf_counter()
        self.stack.step(x_TE, *rest)
        if self.counts(x_TE.shape[0]):
            self.seconds += time.perf_counter() - began


def share_in_blocks(session: LanguageSession[Any], decoding: bool, runs: int) -> float:
    """Share of a run's timed seconds that the whole model spends in its blocks, attention included; of medians."""
    stack = session.llm.engine.runner._stack
    if not isinstance(stack, NativeStack):
        raise RuntimeError("the whole model does not run as one native stack here; the cost model needs that")
    timed = TimedStack(stack.stack, (lambda rows: rows == 1) if decoding else (lambda rows: True))
    whole = [session.run().seconds for _ in range(runs)]
    in_blocks = []
    plain, stack.stack = stack.stack, timed  # type: ignore[assignment]
    # Decoding steps that go on natively from token ids to logits would not stop behind the blocks.
    stack.round = lambda *_: None  # type: ignore[attr-defined, method-assign]
    try:
        for _ in range(runs):
            timed.seconds = 0.0
            session.run()
            in_blocks.append(timed.seconds)
    finally:
        stack.stack = plain
        del stack.round
    return statistics.median(in_blocks) / statistics.median(whole)


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ratio, prediction and quality per workload and number of removals."""
    stopping = Stopping(max_pairs=args.pairs)
    for name, options in JOBS.items():
        job = workloads.get(name)
        whole = job.open(Plan(args.model), options)
        assert isinstance(whole, LanguageSession)
        blocks = whole.llm.engine.runner.decoder.config.num_layers
        whole.run()
        share = share_in_blocks(whole, name == "decode", 5)
        for count in args.remove:
            pruned = job.open(Plan(args.model, (SLEB(remove=count, criterion=args.by),)), options)
            assert isinstance(pruned, LanguageSession)
            warm_up(whole, pruned, 1)
            ratio = measure_pairs(whole, pruned, stopping).interval()
            predicted = 1 / (1 - share * count / blocks)
            yield {
                "workload": name,
                "remove": count,
                "of": blocks,
                "speedup": ratio.to_dict(),
                "predicted": predicted,
                "off_by": ratio.median / predicted - 1,
                "share_in_blocks": share,
                "weight_bytes": [dict(side.facts())["weight_bytes_per_token"] for side in (whole, pruned)],
                "kv_bytes": [dict(side.facts())["kv_bytes_per_token"] for side in (whole, pruned)],
                "perplexity": [whole.quality(), pruned.quality()],
            }
            pruned.close()
        whole.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parts = {"quality": quality, "sensitivity": sensitivity, "analysis": analysis, "speed": speed}
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--remove", type=int, nargs="+", default=[3, 6], help="numbers of removals")
    parser.add_argument(
        "--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="of --quality"
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="draws of calibration text (and of random removal)"
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="calibration segments of 256 tokens, of --quality"
    )
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of 512 tokens")
    parser.add_argument(
        "--by", choices=CRITERIA, default="sleb", help="criterion of --speed; 'last' needs no search"
    )
    parser.add_argument("--pairs", type=int, default=25, help="most pairs of runs of --speed")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    parts = chosen(parser, args, parts)
    with recording(args.threads, args.json) as result:
        result |= {
            "model": args.model,
        }
        for name, part in parts.items():
            record(result, name, part(args))


if __name__ == "__main__":
    main()
