"""RAGCache on questions about the documentation corpus: `python -m benchmarks.ragcache --hits --ttft --speculation
--json FILE`.

``--hits`` (acceptance 3): document hit rates of the eviction policies over the real questions' documents, without a
model: the page pool and three sizes of the host tier. `plain` policies forget how often an evicted document was read.

``--ttft`` (acceptance 4): mean time to first token of the `retrieval` workload, paired and interleaved in one
process: RAGCache against no cache across requests, one tier with the ordinary prefix cache (also with as much memory as
both tiers have), and RAGCache without reordering.

``--speculation`` (acceptance 5): computing ahead of the search or not, with a search that takes ``--search`` seconds
(emulated), at a low and at a high rate.

``--profile`` (acceptance 6): the interpolated cost of prefill against the clock at points between those of the grid,
and the time that choosing the order of 32 waiting requests takes.

Needs a quiet machine, except for ``--hits``. The fast tier is the engine's page pool, the slow one memory of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recording import record, recording
from hasten import workloads
from hasten.core import paths
from hasten.core.plan import Plan
from hasten.lm.context.retrieval import Clock
from hasten.lm.kvcache import prefill_cost
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.ragcache import KnowledgeStore, RagCache
from hasten.lm.llm import LLM
from hasten.measure.environment import usable_cpus
from hasten.measure.interleave import measure_pairs, warm_up
from hasten.measure.statistics import Stopping
from hasten.models.checkpoint import open_checkpoint
from hasten.models.config import HeadShape
from hasten.models.context import BuildContext
from hasten.models.store import resolve
from hasten.workloads.knowledge import IndexSearch, Knowledge
from hasten.workloads.retrieval import Composer, RetrievalSession
from hasten.workloads.retrieval_trace import replay, trace

ENGINE = {"kv_memory_mb": 256, "max_batch": 4}
POLICIES = (("pgdsf", True), ("gdsf", True), ("gdsf", False), ("lru", True), ("lfu", True), ("lfu", False))


def prompts(args: argparse.Namespace, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and document ends of the workload's own prompts, as its search finds their documents."""
    knowledge = Knowledge(args.pages, args.lists, args.characters)
    checkpoint = open_checkpoint(resolve(args.model))

    class Words:  # all that a composer needs of a model
        tokenizer = checkpoint.tokenizer()

    composer, clock, out = Composer(Words, knowledge), Clock(), []  # type: ignore[arg-type]
    for asked in trace(count, args.pages, 0):
        _, heading = composer.subject(asked)
        search = IndexSearch(knowledge, heading, k=2, probes=16, stages=1, clock=clock, asked_at=clock.now())
        found = search.poll()
        assert found is not None
        made = composer.of(asked)(found.documents)
        out.append((made.token_ids, made.segments))
    return out


def hits(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per policy and host size, in multiples of the page pool."""
    asked = prompts(args, args.requests)
    checkpoint = open_checkpoint(resolve(args.model))
    context = BuildContext.of(checkpoint, paths.home() / "artefacts")
    size, pool_pages = 32, int(256e6 / (checkpoint.config.num_layers * 2 * 192 * 2 * 32))
    for times in args.host:
        for policy, history in POLICIES:
            pool, format = PagePool(pool_pages), PlainKV()
            format.allocate(1, pool_pages, size, HeadShape(1, 1, 1))
            settings = RagCache(policy=policy, history=history, host_mb=times * pool_pages * 256 / 1e6)
            store = settings.provide("prefix_store", context)
            assert isinstance(store, KnowledgeStore)
            store.bind(pool, format, size)
            found = replay(store, pool, asked, instructions=1)
            yield {
                "host": times,
                "policy": policy if history else f"{policy} plain",
                "documents": found.hit_rate,
                "tokens": found.cached / found.tokens,
                "swapped": store.swapped,
                "loaded": store.loaded,
            }


def arms() -> dict[str, Plan]:
    return {
        "no cache": Plan(engine={**ENGINE, "prefix_cache": False}),
        "one tier, LRU": Plan(engine=ENGINE),
        "one tier, LRU, as much memory": Plan(engine={**ENGINE, "kv_memory_mb": 256 + RagCache().host_mb}),
        "in order": Plan.of([RagCache(reorder=False)], engine=ENGINE),
        "ragcache": Plan.of([RagCache()], engine=ENGINE),
    }


def session(args: argparse.Namespace, plan: Plan, **options: Any) -> RetrievalSession:
    """The workload with ``plan`` on the chosen model."""
    plan = Plan(args.model, plan.techniques, plan.dtype, plan.engine)
    given = {
        "pages": args.pages,
        "page_characters": args.characters,
        "lists": args.lists,
        "reference": False,
        "rate": args.rate,
        **options,
    }
    opened = workloads.get("retrieval").open(plan, given)
    assert isinstance(opened, RetrievalSession)
    return opened


def compared(baseline: RetrievalSession, candidate: RetrievalSession, pairs: int) -> dict[str, Any]:
    """Ratio of mean times to first token with its interval, and what the runs saw."""
    with baseline, candidate:
        warm_up(baseline, candidate, 2)
        found = measure_pairs(baseline, candidate, Stopping.fixed(pairs))
        sides = {"baseline": found.baseline, "candidate": found.candidate}
        means = {
            side: {key: statistics.fmean(run.detail[key] for run in runs) for key in runs[0].detail}
            for side, runs in sides.items()
        }
        quality = {"baseline": baseline.quality(), "candidate": candidate.quality()}
        return {"ratio": found.interval().to_dict(), "quality": quality, **means}


def ttft(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    plans = arms()
    for name in [name for name in plans if name != "ragcache"]:
        result = compared(session(args, plans[name]), session(args, plans["ragcache"]), args.pairs)
        yield {"baseline": name, "rate": args.rate, **result}


def speculation(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for rate in (args.rate / 8, args.rate * 2):
        without, ahead = (Plan.of([RagCache(speculate=n)], engine=ENGINE) for n in (0, 1))
        options = {"search_seconds": args.search, "rate": rate}
        result = compared(session(args, without, **options), session(args, ahead, **options), args.pairs)
        yield {"rate": rate, "search_seconds": args.search, **result}


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Relative errors at held-out points, and the seconds of arranging a queue of 32."""
    with LLM(Plan.of([RagCache()], model=args.model, engine=ENGINE)) as llm:
        store = llm.engine.cache.store
        assert isinstance(store, KnowledgeStore)
        held = prefill_cost.measure(llm.engine, (128, 1024), (96, 400, 800))
        errors = {
            f"{a}+{b}": store.cost(a, b) / held.seconds[i][j] - 1
            for i, a in enumerate(held.cached)
            for j, b in enumerate(held.new)
        }
        order = store.admission_order()
        assert order is not None
        for n in range(32):
            llm.engine.submit([n + 5] * 1000)
        times = []
        for _ in range(50):
            began = time.perf_counter()
            order.arrange(llm.engine.scheduler.waiting)
            times.append(time.perf_counter() - began)
        llm.engine.cancel_all()
    return {
        "errors": errors,
        "worst": max(map(abs, errors.values())),
        "order_seconds": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hits", "ttft", "speculation", "profile"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--characters", type=int, default=1200, help="least characters of a page")
    parser.add_argument("--lists", type=int, default=128)
    parser.add_argument("--requests", type=int, default=1000, help="of --hits")
    parser.add_argument(
        "--host", type=float, nargs="+", default=[0, 2, 8], help="of --hits: times the page pool"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--search", type=float, default=0.2, help="seconds of a search, of --speculation")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    if not (args.hits or args.ttft or args.speculation or args.profile):
        parser.error("nothing to measure: give --hits, --ttft, --speculation or --profile")
    with recording(args.threads, args.json) as result:
        for name, measured in (("hits", hits), ("ttft", ttft), ("speculation", speculation)):
            if getattr(args, name):
                record(result, name, measured(args))
        if args.profile:
            result["profile"] = profile(args)
            print(json.dumps(result["profile"]), flush=True)


if __name__ == "__main__":
    main()
