"""Drift and speed of `resa` (acceptance 4 and 5 of its specification): `python -m benchmarks.resa --json FILE`.

``--drift``: real text, decoded token by token (teacher forced) after a prefill, once densely and once for each number
of tokens between repairs. Divergence of the next-token distribution from dense (KL), by position; the drift is what it
is above that of repairing after every token, which is the error of reading a selection and no repair can take away.
Error of the cached keys and values before and after each repair, and the share of time that repairs take.

``--decode``: decoding at the end of a context, dense, sparse, and sparse with repairs: rounds of one window of tokens
and its repair, interleaved, on the engine's own runner. The context's keys and values are random numbers (so that 32K
need no prefill): speed only. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.recording import record, recording
from hasten.attention.resa import BlockPolicy, Rectified, Resa
from hasten.core.plan import Plan
from hasten.kernels import bounds
from hasten.kernels.bounds import KeepRule
from hasten.lm.build import Loaded, load
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import SequenceKV
from hasten.lm.kvcache.repair import repair_from
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.text import Text

DENSE = KeepRule(1.0, 16, 1)
NEVER = 1 << 30


class Stand:
    """One sequence on a loaded engine, decoded by hand; ``every`` and ``rule`` say how."""

    def __init__(self, model: str, tokens: int, weights: str, technique: Resa) -> None:
        page = 32
        engine = {"kv_tokens": tokens + page, "prefix_cache": False, "max_context": tokens + page}
        use = [technique] if weights == "native" else [technique, weights]
        self.loaded: Loaded = load(Plan.of(use, model=model, engine=engine))
        self.engine = self.loaded.engine
        policy = self.engine.runner.policy
        assert isinstance(policy, Rectified)
        assert isinstance(policy.policy, BlockPolicy)
        self.rectified, self.blocks, self.sparse = policy, policy.policy, policy.policy.rule
        self.kv: SequenceKV = self.engine.cache.open(self.engine.new_id())
        assert self.engine.cache.reserve(self.kv, 0, tokens)
        self.engine.cache.attach(self.kv)

    def arm(self, every: int | None) -> None:
        """Dense for None, else sparse with a repair after so many tokens."""
        self.blocks.rule = DENSE if every is None else self.sparse
        self.rectified.every = every or NEVER

    def feed(self, ids: Sequence[int], start: int, stop: int, logits: bool = False) -> Tensor:
        chunk = Chunk(self.kv, start, ids[start:stop], range(start, stop), int(logits))
        return self.engine.runner.run([chunk])

    def stale(self) -> int | None:
        repair = self.rectified.repair
        assert repair is not None
        return repair_from(self.kv, repair)

    def cached(self, start: int, stop: int) -> Tensor:
        """Keys and values of tokens [start, stop), float32 [layers, 2, G, tokens, D]."""
        cache, first = self.engine.cache, start // self.engine.cache.page_size
        ids, skip = torch.tensor(self.kv.pages[first:]), start - first * cache.page_size
        out = []
        for layer in range(cache.layers):
            pages: Any = cache.format.pages(layer)
            for part in (pages.k_NGPD, pages.v_NGPD):
                out.append(part[ids].float().transpose(0, 1).flatten(1, 2)[:, skip : skip + stop - start])
        return torch.stack(out).unflatten(0, (cache.layers, 2))


# -- drift --------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What one arm gave: divergence by position, seconds, and errors of the cache around repairs."""

    kl: list[float] = field(default_factory=list)
    decode_seconds: float = 0.0
    repair_seconds: float = 0.0
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


def decoded(
    stand: Stand,
    ids: list[int],
    first: int,
    step: Callable[[int, Tensor], None],
    trace: Trace,
    kv_T: Tensor | None,
):
    """Decode tokens [first, len - 1) one by one; ``step`` sees each position's log-probabilities."""
    for at in range(first, len(ids) - 1):
        if (start := stand.stale()) is not None:
            stop = stand.kv.length
            if kv_T is not None:
                trace.before.append(
                    error(stand.cached(start, stop), kv_T[..., start - first : stop - first, :])
                )
            begin = time.perf_counter()
            stand.feed(ids, start, stop)
            trace.repair_seconds += time.perf_counter() - begin
            if kv_T is not None:
                trace.after.append(
                    error(stand.cached(start, stop), kv_T[..., start - first : stop - first, :])
                )
        begin = time.perf_counter()
        logits_RV = stand.feed(ids, at, at + 1, logits=True)
        trace.decode_seconds += time.perf_counter() - begin
        step(at - first, torch.log_softmax(logits_RV[0].float(), -1))


def error(got: Tensor, want: Tensor) -> float:
    """Relative error of keys and values in the Euclidean norm."""
    return float((got - want).norm() / want.norm())


def drift(stand: Stand, ids: list[int], positions: int, arms: Sequence[int]) -> dict[int, Trace]:
    """One trace per arm, on one text."""
    page = stand.engine.cache.page_size
    first = (len(ids) - 1 - positions) // page * page
    stand.arm(None)
    stand.engine.cache.truncate(stand.kv, 0)
    stand.kv.exact = None
    assert stand.engine.cache.reserve(stand.kv, 0, len(ids))
    for start in range(0, len(ids), 512):
        stand.feed(ids, start, min(start + 512, len(ids)))
    kv_T = stand.cached(first, stand.kv.length)

    def begin(every: int | None) -> None:
        stand.engine.cache.truncate(stand.kv, first)
        stand.kv.exact = first
        assert stand.engine.cache.reserve(stand.kv, 0, len(ids))
        stand.arm(every)

    begin(None)
    dense: list[Tensor] = []
    decoded(stand, ids, first, lambda _, logprob_V: dense.append(logprob_V.half()), Trace(), None)
    traces: dict[int, Trace] = {}
    for every in arms:
        trace = traces[every] = Trace()
        begin(every)

        def note(i: int, logprob_V: Tensor, kl: list[float] = trace.kl) -> None:
            want_V = dense[i].float()
            kl.append(float((want_V.exp() * (want_V - logprob_V)).sum()))

        decoded(stand, ids, first, note, trace, kv_T)
    return traces


def ratio_interval(
    over: NDArray[Any], under: NDArray[Any], length: int = 64, draws: int = 2000
) -> tuple[float, float, float]:
    """Ratio of means of paired series and its 95% interval, from a bootstrap of blocks (neighbours are alike)."""
    rng, count = np.random.default_rng(0), max(1, len(over) // length)
    parts = [np.array_split(series, count) for series in (over, under)]
    sums = [np.array([part.sum() for part in series]) for series in parts]
    drawn = rng.integers(0, count, (draws, count))
    ratios = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(over.mean() / under.mean()), float(low), float(high)


def name(every: int) -> str:
    return "never" if every == NEVER else str(every)


def drift_records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    stand = Stand(args.model, args.length, args.weights, Resa(ratio=args.ratio))
    arms = [every or NEVER for every in args.every]
    windows = Text(stand.loaded.tokenizer).windows(args.length, args.texts, skip=args.skip)
    found = [drift(stand, ids, args.positions, arms) for ids in windows]
    kl = {every: np.concatenate([one[every].kl for one in found]) for every in arms}
    for every in arms:
        traces = [one[every] for one in found]
        record: dict[str, Any] = {"every": name(every), "ratio": args.ratio, "kl": float(kl[every].mean())}
        per_text = np.stack([np.array(t.kl) for t in traces]).mean(0)
        record["kl_by_quarter"] = [float(part.mean()) for part in np.array_split(per_text, 4)]
        if 1 in kl and every != 1:
            record["drift"] = record["kl"] - float(kl[1].mean())
            if NEVER in kl and every != NEVER:
                of_never = ratio_interval(kl[every] - kl[1], kl[NEVER] - kl[1])
                record["drift_of_never"] = dict(zip(("ratio", "low", "high"), of_never, strict=True))
        repairing, all_ = (sum(t.repair_seconds for t in traces), sum(t.decode_seconds for t in traces))
        record["repair_share"] = repairing / (repairing + all_)
        before, after = ([e for t in traces for e in getattr(t, side)] for side in ("before", "after"))
        if before:
            record["cache_error"] = {"before": statistics.fmean(before), "after": max(after)}
        yield record


# -- speed --------------------------------------------------------------------------------------------------------


def fill(stand: Stand, tokens: int) -> None:
    """Pretend that ``tokens`` random tokens were read."""
    cache = stand.engine.cache
    for layer in range(cache.layers):
        pages: Any = cache.format.pages(layer)
        for part in (pages.k_NGPD, pages.v_NGPD):
            part.copy_(torch.randn(part.shape))
        box = stand.blocks.bounds[layer]
        blocks = torch.arange(box.shape[0] * box.shape[2])
        bounds.bounds_rebuild(
            pages.k_NGPD, blocks, torch.full((len(blocks),), stand.blocks.block, dtype=torch.int32), box
        )
    stand.kv.length = stand.kv.exact = tokens


def decode_records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for weights in args.weight:
        for context in args.context:
            yield decode_case(args, weights, context)


def decode_case(args: argparse.Namespace, weights: str, context: int) -> dict[str, Any]:
    every = args.window
    stand = Stand(args.model, context, weights, Resa(ratio=args.ratio))
    start = (context - every - 1) // every * every
    fill(stand, start)
    ids = torch.randint(100, 1000, (context,)).tolist()

    def window(arm: int | None) -> tuple[float, float]:
        """Seconds of a window's tokens and of its repair."""
        stand.arm(arm)
        stand.kv.length = stand.kv.exact = start
        begin = time.perf_counter()
        for at in range(start, start + every):
            stand.feed(ids, at, at + 1, logits=True)
        middle = time.perf_counter()
        if (stale := stand.stale()) is not None:
            stand.feed(ids, stale, stand.kv.length)
        return middle - begin, time.perf_counter() - middle

    arms: dict[str, int | None] = {"dense": None, "sparse": NEVER, "resa": every}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for i in range(args.rounds + 1):
        for arm in list(arms) if i % 2 == 0 else list(arms)[::-1]:
            seconds[arm].append(window(arms[arm]))
    seconds = {arm: found[1:] for arm, found in seconds.items()}  # the first round warms up
    total = {arm: [sum(parts) for parts in found] for arm, found in seconds.items()}
    out: dict[str, Any] = {"weights": weights, "context": context, "every": every, "ratio": args.ratio}
    out["ms_per_token"] = {arm: 1e3 * statistics.median(found) / every for arm, found in total.items()}
    for arm in ("sparse", "resa"):
        ratios = [d / s for d, s in zip(total["dense"], total[arm], strict=True)]
        out[f"speedup_{arm}"] = median_interval(ratios).to_dict()
    out["repair_share"] = statistics.median(repair / (decode + repair) for decode, repair in seconds["resa"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument(
        "--drift", action="store_true", help="divergence from dense by tokens between repairs"
    )
    parser.add_argument("--decode", action="store_true", help="speed of decoding")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument(
        "--every", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 0], help="of --drift; 0: never"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text, of --drift")
    parser.add_argument("--positions", type=int, default=1024, help="tokens decoded at its end")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="texts of the corpus to leave out")
    parser.add_argument("--weights", default="native", help="weight format of --drift: native or a technique")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768], help="of --decode")
    parser.add_argument("--weight", nargs="+", default=["native"], help="weight formats of --decode")
    parser.add_argument("--window", type=int, default=32, help="tokens between repairs, of --decode")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not (args.drift or args.decode):
        parser.error("nothing to measure: give --drift, --decode or both")
    with recording(args.threads, args.json) as result:
        for part, records in (("drift", drift_records), ("decode", decode_records)):
            if getattr(args, part):
                record(result, part, records(args))


if __name__ == "__main__":
    main()
