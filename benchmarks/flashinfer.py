"""Speed of `flashinfer` (acceptance 3 and 5 of its specification): `python -m benchmarks.flashinfer --json FILE`.

| case | compares |
| --- | --- |
| attention | one layer, skewed, even and mixed batches, page sizes: against static scheduling and gather + SDPA |
| packing | one decoding sequence on one thread: query heads of a group together or each for itself |
| plan | time of planning a step at batch 64, fresh and moved, as a share of the step |
| serving | requests that arrive at random: time between tokens and to the first, against the same baselines |
| streaming | sink + recent window, positions re-indexed: rotary embedding on read, or a pass over the window |
| generation | n samples of one prompt: composable formats, single format, static without packing |

Ratios are medians of paired rounds with 95% bootstrap intervals; run on a quiet machine. ``--calibrate`` measures the
constants of the scheduler's cost model instead (`kCosts` in native/src/kernels/flashinfer_plan.cpp).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.flashinfer_arms import GatherSDPA, Static, Streaming, per_layer, random_pool
from benchmarks.hydragen import DTYPES, SHAPES, NoAttention, rounds_of
from benchmarks.recording import recording
from hasten.attention.dense import DenseKernel
from hasten.attention.flashinfer import FlashInfer, FlashInferKernel
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense
from hasten.core.plan import Plan
from hasten.kernels.schedule import Schedule
from hasten.lm.build import load
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import NoPrefixStore
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.lm.runner import Runner
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval

CASES = ("attention", "packing", "plan", "serving", "streaming", "generation")
PAGE = 32


def speedups(seconds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """How much faster ``ours`` is than each other arm."""
    return {
        name: median_interval([b / a for a, b in zip(seconds[ours], theirs, strict=True)]).to_dict()
        for name, theirs in seconds.items()
        if name != ours
    }


def result(seconds: dict[str, list[float]], ours: str = "flashinfer", **facts: Any) -> dict[str, Any]:
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {**facts, "median_ms": medians, "speedup_over": speedups(seconds, ours)}


def make_layout(lengths: Sequence[int], rows: Sequence[int], page: int = PAGE) -> tuple[StepLayout, int]:
    """Sequences with pages of their own, scattered over the pool; and the pool's pages."""
    pages = [-(-n // page) for n in lengths]
    ids = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(lengths), max(pages)), -1, dtype=torch.int32)
    for s, (end, count) in enumerate(zip(accumulate(pages), pages, strict=True)):
        table[s, :count] = ids[end - count : end]
    position = [i for n, r in zip(lengths, rows, strict=True) for i in range(n - r, n)]
    return (
        StepLayout(
            query_start_S1=torch.tensor([0, *accumulate(rows)], dtype=torch.int32),
            kv_len_S=torch.tensor(lengths, dtype=torch.int32),
            page_table_SM=table,
            position_T=torch.tensor(position),
            slot_T=torch.zeros(len(position), dtype=torch.int64),
            page_size=page,
            sequence_ids=tuple(range(len(lengths))),
        ),
        sum(pages),
    )


def zipf(count: int, low: int, high: int, seed: int = 0) -> list[int]:
    """Lengths that fall off as a power of their rank, in random order."""
    rng = np.random.default_rng(seed)
    values = np.maximum(high / np.arange(1, count + 1) ** 1.1, low).astype(int)
    return [int(n) for n in rng.permutation(values)]


def attention(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    batches = {
        "skewed": ([8192] + [100] * 7, [1] * 8),
        "zipf": (zipf(16, 100, 8192), [1] * 16),
        "even": ([1024] * 16, [1] * 16),
        "mixed": ([2048, *zipf(15, 100, 4096)], [256] + [1] * 15),
    }
    out = []
    for shape_name, shape in SHAPES.items():
        spec = AttentionSpec(shape, shape.size**-0.5)
        for name, (lengths, rows) in batches.items():
            for page in (1, 8, 16, 32) if name == "zipf" else (PAGE,):
                layout, pages = make_layout(lengths, rows, page)
                pool, q = (
                    random_pool(pages, shape, page, dtype),
                    torch.randn(sum(rows), shape.heads, shape.size),
                )
                kernels: dict[str, AttentionKernel] = {
                    "flashinfer": FlashInferKernel(FlashInfer()),
                    "static": Static(packed=True),
                    "static unpacked": Static(packed=False),
                    "gather + sdpa": GatherSDPA(),
                }
                arms = {
                    n: partial(k.run, k.plan(layout), 0, q, pool, layout, spec, Dense())
                    for n, k in kernels.items()
                }
                plan = kernels["flashinfer"].reading(kernels["flashinfer"].plan(layout), spec)
                assert plan is not None
                facts = {"batch": name, "page": page, "unevenness": plan.schedule.facts().unevenness}
                out.append(result(rounds_of(arms, rounds), shape=shape_name, **facts))
                print(json.dumps(out[-1]), flush=True)
    return out


def packing(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One thread, so that nothing but the order of reading differs."""
    threads, out = torch.get_num_threads(), []
    torch.set_num_threads(1)
    shape = SHAPES["smollm2 (9 heads, 3 kv)"]
    spec = AttentionSpec(shape, shape.size**-0.5)
    for length in (1024, 4096, 16384, 65536):
        layout, pages = make_layout([length], [1])
        pool, q = random_pool(pages, shape, PAGE, dtype), torch.randn(1, shape.heads, shape.size)
        kernels = {"packed": Static(packed=True), "unpacked": Static(packed=False)}
        arms = {
            n: partial(k.run, k.plan(layout), 0, q, pool, layout, spec, Dense()) for n, k in kernels.items()
        }
        out.append(result(rounds_of(arms, rounds), "packed", context=length))
        print(json.dumps(out[-1]), flush=True)
    torch.set_num_threads(threads)
    return out


def filled_cache(
    config: Any, dtype: torch.dtype, tables: list[list[int]], length: int
) -> tuple[KVCache, list[Any]]:
    """A cache of random numbers in which sequence i holds the pages ``tables[i]``, one token short of ``length``."""
    cache = KVCache(
        PlainKV(dtype),
        NoPrefixStore(),
        layers=config.num_layers,
        shape=config.shape,
        pages=1 + max(max(t) for t in tables),
        page_size=PAGE,
        rows=len(tables),
        context=length,
    )
    for layer in range(config.num_layers):
        view = cache.format.pages(layer)
        for tensor in (view.k_NGPD, view.v_NGPD):
            tensor.copy_(torch.randn(1, *tensor.shape[1:]).to(dtype).expand_as(tensor))
    opened = []
    for i, pages in enumerate(tables):
        kv = cache.open(i)
        kv.pages, kv.length = list(pages), length - 1
        cache.attach(kv)
        opened.append(kv)
    return cache, opened


def step_of(
    loaded: Any, cache: KVCache, opened: list[Any], length: int, kernel: AttentionKernel
) -> Callable[[], Tensor]:
    """Decodes the last position of every sequence, again at every call."""
    runner = Runner(loaded.decoder, cache, kernel)
    return partial(
        runner.run, [Chunk(kv, length - 1, [7 + i], [length - 1], 1) for i, kv in enumerate(opened)]
    )


def plan(loaded: Any, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    batch, length = 64, 1024
    tables = [list(range(i * length // PAGE, (i + 1) * length // PAGE)) for i in range(batch)]
    cache, opened = filled_cache(loaded.decoder.config, dtype, tables, length)
    spec = loaded.decoder.config.attention(0)
    layout, _ = make_layout([length - 7] * batch, [1] * batch)
    moving, kept = FlashInferKernel(FlashInfer()), FlashInferKernel(FlashInfer())
    kept.plan(layout).part(spec)

    def fresh() -> object:
        moving._last = None
        return moving.plan(layout).part(spec)

    arms: dict[str, Callable[[], object]] = {
        "step": step_of(loaded, cache, opened, length, FlashInferKernel(FlashInfer())),
        "fresh plan": fresh,
        "moved plan": lambda: kept.plan(layout).part(spec),
    }
    seconds = rounds_of(arms, rounds)
    share = {
        n: statistics.median(a / b for a, b in zip(seconds[n], seconds["step"], strict=True)) for n in arms
    }
    out = {
        "batch": batch,
        "context": length,
        "median_us": {n: 1e6 * statistics.median(v) for n, v in seconds.items()},
        "share_of_step": share,
    }
    print(json.dumps(out), flush=True)
    return out


def serving(model: str, dtype: str, rounds: int, count: int, longest: int) -> list[dict[str, Any]]:
    """The engine's own clock: time passes only while steps run, so that all arms see the same arrivals."""
    rng, out = np.random.default_rng(0), []
    kinds = {
        "constant": [longest // 2] * count,
        "uniform": [int(n) for n in rng.integers(longest // 4, longest + 1, count)],
        "zipf": zipf(count, 32, 2 * longest),
    }
    llm = LLM(model, dtype=dtype, prefix_cache=False, max_batch=count, threads=torch.get_num_threads())
    arms: dict[str, AttentionKernel] = {
        "flashinfer": FlashInferKernel(FlashInfer()),
        "static": Static(packed=True),
        "gather + sdpa": GatherSDPA(),
    }
    for name, lengths in kinds.items():
        prompts = [rng.integers(10, 40000, n).tolist() for n in lengths]
        arrival = np.cumsum(rng.exponential(0.3, count))
        gaps: dict[str, list[float]] = {arm: [] for arm in arms}
        firsts: dict[str, list[float]] = {arm: [] for arm in arms}
        for i in range(rounds + 1):
            for arm in list(arms) if i % 2 == 0 else list(arms)[::-1]:
                llm.engine.runner.kernel = arms[arm]
                gap, first = _trace(llm, prompts, arrival.tolist())
                if i:  # the first round warms up
                    gaps[arm].append(gap)
                    firsts[arm].append(first)
        out.append(
            {
                "lengths": name,
                "between_tokens": result(gaps),
                "to_first_token": result(firsts),
                "itl_reduction": {n: 1 - 1 / s["median"] for n, s in speedups(gaps, "flashinfer").items()},
            }
        )
        print(json.dumps(out[-1]), flush=True)
    return out


def _trace(llm: LLM, prompts: list[list[int]], arrival: list[float]) -> tuple[float, float]:
    """Median seconds between tokens and to the first token."""
    engine, params = llm.engine, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    clock, i, came = 0.0, 0, set[int]()
    last: dict[int, float] = {}
    gaps, firsts = [], []
    while i < len(prompts) or engine.busy:
        if not engine.busy:
            clock = max(clock, arrival[i])
        while i < len(prompts) and arrival[i] <= clock:
            engine.submit(prompts[i], params, on_delta=lambda delta, i=i: delta.token_ids and came.add(i))
            i += 1
        begin = time.perf_counter()
        engine.step()
        clock += time.perf_counter() - begin
        for request in came:
            (gaps if request in last else firsts).append(clock - last.get(request, arrival[request]))
            last[request] = clock
        came.clear()
    return statistics.median(gaps), statistics.median(firsts)


def streaming(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One decode step of all 30 layers' attention over a sink page and the recent pages, keys cached unrotated."""
    out = []
    for batch in (1, 8):
        for window in (256, 1024, 2048):
            job = Streaming(batch, window, dtype)
            job.check()
            seconds = rounds_of({"fused": job.fused, "separate pass": job.separate}, rounds)
            out.append(result(seconds, "fused", batch=batch, window=window))
            print(json.dumps(out[-1]), flush=True)
    return out


def generation(loaded: Any, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Whole decode steps of n samples of one prompt of 2K tokens; attention is called layer by layer in all arms."""
    prompt, own, out = 2048, 64, []
    for n in (1, 4, 8, 16, 32, 64):
        shared, mine = prompt // PAGE, own // PAGE
        tables = [[*range(shared), *range(shared + i * mine, shared + (i + 1) * mine)] for i in range(n)]
        cache, opened = filled_cache(loaded.decoder.config, dtype, tables, prompt + own)
        kernels: dict[str, AttentionKernel] = {
            "flashinfer": per_layer(composable=True),
            "single format": per_layer(composable=False),
            "static": Static(packed=True),
            "static unpacked": Static(packed=False),
            "none": NoAttention(),
        }
        kernels["static"].reading = lambda plan, spec: None  # type: ignore[method-assign]
        arms = {name: step_of(loaded, cache, opened, prompt + own, k) for name, k in kernels.items()}
        out.append(result(rounds_of(arms, rounds), n=n, prompt=prompt))
        print(json.dumps(out[-1]), flush=True)
    return out


def generation_attention(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The same for one layer's attention alone, also on a decoder without grouped heads."""
    prompt, own, out = 2048, 64, []
    for shape_name, shape in SHAPES.items():
        spec = AttentionSpec(shape, shape.size**-0.5)
        for n in (2, 3, 4, 8, 16, 32, 64):
            shared, mine = prompt // PAGE, own // PAGE
            tables = [[*range(shared), *range(shared + i * mine, shared + (i + 1) * mine)] for i in range(n)]
            layout, _ = make_layout([prompt + own] * n, [1] * n)
            layout = StepLayout(
                **{**layout.__dict__, "page_table_SM": torch.tensor(tables, dtype=torch.int32)}
            )
            pool = random_pool(shared + n * mine, shape, PAGE, dtype)
            q = torch.randn(n, shape.heads, shape.size)
            kernels: dict[str, AttentionKernel] = {
                "flashinfer": FlashInferKernel(FlashInfer()),
                "single format": DenseKernel(),
                "static unpacked": Static(packed=False),
            }
            arms = {
                a: partial(k.run, k.plan(layout), 0, q, pool, layout, spec, Dense())
                for a, k in kernels.items()
            }
            out.append(result(rounds_of(arms, rounds), shape=shape_name, n=n))
            print(json.dumps(out[-1]), flush=True)
    return out


def calibrate(rounds: int) -> dict[str, Any]:
    """The cost model's constants in nanoseconds, by least squares over the relative errors of tasks of many sizes."""
    torch.set_num_threads(1)
    rows_of = (1, 2, 3, 4, 6, 8, 9, 12, 24, 48, 96)
    lengths, times = (128, 512, 2048), {}
    for rows in rows_of:
        for length in lengths:
            tasks, per = max(4, min(64, 200_000 // (length * rows))), length // PAGE
            shape, every = HeadShape(1, 1, 64), np.arange(tasks * rows)
            pool = random_pool(tasks * per, shape, PAGE, torch.bfloat16)
            schedule = Schedule(
                np.arange(tasks * per),
                np.arange(tasks + 1) * per,
                np.zeros(tasks, np.int64),
                np.arange(tasks + 1) * rows,
                every,
                np.zeros_like(every),
                np.full_like(every, length),
                page_size=PAGE,
                rows=len(every),
                heads=1,
                kv_heads=1,
                workers=1,
            )
            q = torch.randn(len(every), 1, 64)
            seconds = rounds_of({"run": partial(schedule.run, q, pool.k_NGPD, pool.v_NGPD, 0.125)}, rounds)
            times[rows, length] = 1e9 * min(seconds["run"]) / tasks
    out: dict[str, Any] = {"ns_per_task": {f"{r} x {n}": t for (r, n), t in times.items()}}
    for name, wanted, vectors in (("few", lambda r: r <= 8, 3), ("many", lambda r: r > 8, 6)):
        data = [(r, n, t) for (r, n), t in times.items() if wanted(r)]
        terms = np.array([(r, n, n * -(-r // vectors)) for r, n, _ in data], float)
        measured = np.array([t for *_, t in data])
        fit, *_ = np.linalg.lstsq(terms / measured[:, None], np.ones(len(data)), rcond=None)
        out[name] = dict(zip(("alpha", "token", "pass"), np.maximum(fit, 0).tolist(), strict=True))
        out[name]["largest_error"] = float(np.abs(terms @ fit / measured - 1).max())
    print(json.dumps(out, indent=2), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the KV pages")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", default="auto", help="dtype of the model's plan")
    parser.add_argument("--requests", type=int, default=6, help="of a serving trace")
    parser.add_argument(
        "--longest", type=int, default=512, help="prompt tokens of a serving trace (zipf: twice)"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure the cost model's constants instead")
    args = parser.parse_args()
    with recording(args.threads, args.json) as report:
        dtype = DTYPES[args.dtype]
        with torch.inference_mode():
            if args.calibrate:
                report["costs"] = calibrate(args.rounds)
                args.cases = []
            loaded = (
                load(Plan(args.model, dtype=args.weights)) if {"plan", "generation"} & {*args.cases} else None
            )
            for case in args.cases:
                if case == "attention":
                    report[case] = attention(dtype, args.rounds)
                elif case == "packing":
                    report[case] = packing(dtype, args.rounds)
                elif case == "plan":
                    report[case] = plan(loaded, dtype, args.rounds)
                elif case == "serving":
                    report[case] = serving(
                        args.model, args.weights, max(6, args.rounds // 2), args.requests, args.longest
                    )
                elif case == "streaming":
                    report[case] = streaming(dtype, args.rounds)
                else:
                    report["generation_attention"] = generation_attention(dtype, args.rounds)
                    report[case] = generation(loaded, dtype, args.rounds)


if __name__ == "__main__":
    main()
