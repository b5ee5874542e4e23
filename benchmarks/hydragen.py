"""Speed of `hydragen` (acceptance 4 and 5 of its specification): `python -m benchmarks.hydragen --json FILE`.

Attention alone, one layer, and whole decode steps of a model (``--steps``), on caches filled with random numbers: no
prefill is measured. Arms, interleaved round by round:

    hydragen    shared pages, read once for all sequences
    shared      the same pages, read by each sequence itself (the default kernel; the vLLM arm)
    duplicated  every sequence has its own copy of the prefix (no prefix cache; the FlashAttention arm)
    none        no attention at all (whole steps only): the bound

Run on a quiet machine. Ratios are medians of paired rounds with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recording import recording
from hasten.attention.dense import DenseKernel
from hasten.attention.hydragen import Hydragen, HydragenKernel
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import Dense
from hasten.core.plan import Plan
from hasten.lm.build import load
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import NoPrefixStore
from hasten.lm.runner import Runner
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval

PAGE = 32
SUFFIX = 64
SHAPES = {"smollm2 (9 heads, 3 kv)": HeadShape(9, 3, 64), "mha (8 heads, 8 kv)": HeadShape(8, 8, 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Arms = Mapping[str, Callable[[], object]]


class NoAttention(AttentionKernel):
    """The bound: attention costs nothing and answers zeros."""

    def plan(self, layout: StepLayout) -> None:
        return None

    def run(self, plan: None, layer: int, q_THD: Tensor, *rest: Any, **named: Any) -> Tensor:
        return torch.zeros_like(q_THD)


def page_ids(batch: int, prefix: int, *, duplicated: bool) -> tuple[list[list[int]], int]:
    """Pages of every sequence (prefix, then its own suffix), and how many there are in all."""
    shared, own = prefix // PAGE, SUFFIX // PAGE
    each = shared + own if duplicated else own
    start = 0 if duplicated else shared
    tables = [[*range(start), *range(start + each * i, start + each * (i + 1))] for i in range(batch)]
    return tables, start + each * batch


def decode_layout(tables: list[list[int]]) -> StepLayout:
    """Each sequence decodes the last token of its pages."""
    batch, length = len(tables), len(tables[0]) * PAGE
    table = torch.tensor(tables, dtype=torch.int32)
    return StepLayout(
        query_start_S1=torch.arange(batch + 1, dtype=torch.int32),
        kv_len_S=torch.full((batch,), length, dtype=torch.int32),
        page_table_SM=table,
        position_T=torch.full((batch,), length - 1),
        slot_T=table[:, -1].long() * PAGE + PAGE - 1,
        page_size=PAGE,
        sequence_ids=tuple(range(batch)),
    )


def random_pages(pages: int, shape: HeadShape, dtype: torch.dtype) -> KVPages:
    size = (pages, shape.kv_heads, PAGE, shape.size)
    block = torch.randn(min(pages, 64), *size[1:]).to(dtype)
    repeats = -(-pages // len(block))
    k, v = (block.repeat(repeats, 1, 1, 1)[:pages].contiguous() for _ in range(2))
    return KVPages(k, v)


def rounds_of(arms: Arms, rounds: int) -> dict[str, list[float]]:
    """Seconds per arm and round; every round runs all arms, in turn forwards and backwards."""
    for run in arms.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms) if i % 2 == 0 else list(arms)[::-1]:
            begin = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How much faster hydragen is than each other arm."""
    ours = seconds["hydragen"]
    return {
        name: median_interval([b / a for a, b in zip(ours, theirs, strict=True)]).to_dict()
        for name, theirs in seconds.items()
        if name != "hydragen"
    }


def gemm_rate(rounds: int) -> float:
    """FLOP/s of the library's float32 matrix product on all threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(rounds_of({"gemm": lambda: a @ b}, rounds)["gemm"])


def attention_case(
    shape: HeadShape, dtype: torch.dtype, batch: int, prefix: int, rounds: int
) -> dict[str, Any]:
    """One layer of attention of a decode step."""
    spec = AttentionSpec(shape, shape.size**-0.5)
    q = torch.randn(batch, shape.heads, shape.size)
    arms: dict[str, Callable[[], object]] = {}
    kernels = {"hydragen": HydragenKernel(Hydragen()), "shared": DenseKernel(), "duplicated": DenseKernel()}
    pools: dict[bool, KVPages] = {}
    for name, kernel in kernels.items():
        tables, pages = page_ids(batch, prefix, duplicated=name == "duplicated")
        layout = decode_layout(tables)
        pool = pools.setdefault(name == "duplicated", random_pages(pages, shape, dtype))
        plan = kernel.plan(layout)
        arms[name] = partial(kernel.run, plan, 0, q, pool, layout, spec, Dense())
    # The prefix part alone: its rate against the matrix product's.
    prefix_layout = decode_layout([list(range(prefix // PAGE + SUFFIX // PAGE))] * batch)
    only = HydragenKernel(Hydragen())
    pool = pools[False]
    if batch > 1:
        plan = only.plan(prefix_layout)
        arms["prefix part"] = partial(only.run, plan, 0, q, pool, prefix_layout, spec, Dense())
    seconds = rounds_of(arms, rounds)
    part = seconds.pop("prefix part", None)
    flops = 4 * shape.heads * shape.size * batch * (prefix + SUFFIX)
    return {
        "batch": batch,
        "prefix": prefix,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speedup_over": ratios(seconds),
        "prefix_flops": None if part is None else flops / statistics.median(part),
    }


def step_case(loaded: Any, dtype: torch.dtype, batch: int, prefix: int, rounds: int) -> dict[str, Any]:
    """Whole decode steps of a model, all arms on the same weights."""
    config = loaded.decoder.config
    arms: dict[str, Callable[[], object]] = {}
    caches: dict[bool, tuple[KVCache, list[list[int]]]] = {}
    for duplicated in (False, True):
        tables, pages = page_ids(batch, prefix, duplicated=duplicated)
        cache = KVCache(
            PlainKV(dtype),
            NoPrefixStore(),
            layers=config.num_layers,
            shape=config.shape,
            pages=pages,
            page_size=PAGE,
            rows=batch,
            context=prefix + SUFFIX,
        )
        for layer in range(config.num_layers):
            view = cache.format.pages(layer)
            for tensor in (view.k_NGPD, view.v_NGPD):
                tensor.copy_(torch.randn(1, *tensor.shape[1:]).to(dtype).expand_as(tensor))
        caches[duplicated] = (cache, tables)
    length = prefix + SUFFIX
    kernels: dict[str, AttentionKernel] = {
        "hydragen": HydragenKernel(Hydragen()),
        "shared": DenseKernel(),
        "duplicated": DenseKernel(),
        "none": NoAttention(),
    }
    opened: dict[bool, list[Any]] = {}
    for duplicated, (cache, tables) in caches.items():
        opened[duplicated] = []
        for i, pages_of in enumerate(tables):
            kv = cache.open(i)
            kv.pages, kv.length = list(pages_of), length - 1
            cache.attach(kv)
            opened[duplicated].append(kv)
    for name, kernel in kernels.items():
        duplicated = name == "duplicated"
        runner = Runner(loaded.decoder, caches[duplicated][0], kernel)
        # Starting at the same token every time decodes the last position again and again.
        chunks = [Chunk(kv, length - 1, [7 + i], [length - 1], 1) for i, kv in enumerate(opened[duplicated])]
        arms[name] = partial(runner.run, chunks)
    seconds = rounds_of(arms, rounds)
    return {
        "batch": batch,
        "prefix": prefix,
        "tokens_per_second": {name: batch / statistics.median(values) for name, values in seconds.items()},
        "speedup_over": ratios(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 4096, 7168])
    parser.add_argument(
        "--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES), help="of the KV pages"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--steps", action="store_true", help="also whole decode steps (needs the model)")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", help="dtype of the model's plan; by default that of the KV pages")
    parser.add_argument(
        "--memory-gb", type=float, default=8.0, help="skip cases whose duplicated cache is larger"
    )
    args = parser.parse_args()
    with recording(args.threads, args.json) as result:
        result |= {
            "gemm_flops": gemm_rate(args.rounds),
            "attention": [],
            "steps": [],
        }
        for dtype_name in args.dtype:
            dtype = DTYPES[dtype_name]
            for shape_name, shape in SHAPES.items():
                for batch in args.batch:
                    for prefix in args.prefix:
                        with torch.inference_mode():
                            case = attention_case(shape, dtype, batch, prefix, args.rounds)
                        result["attention"].append({"shape": shape_name, "dtype": dtype_name, **case})
                        print(json.dumps(result["attention"][-1]), flush=True)
            if args.steps:
                loaded = load(Plan(args.model, dtype=args.weights or dtype_name))
                config = loaded.decoder.config
                per_token = 2 * config.num_layers * config.shape.kv_heads * config.shape.size * dtype.itemsize
                for batch in args.batch:
                    for prefix in args.prefix:
                        if batch * (prefix + SUFFIX) * per_token > args.memory_gb * 1e9:
                            print(json.dumps({"skipped": [batch, prefix], "why": "--memory-gb"}), flush=True)
                            continue
                        case = step_case(loaded, dtype, batch, prefix, args.rounds)
                        result["steps"].append({"model": args.model, "dtype": dtype_name, **case})
                        print(json.dumps(result["steps"][-1]), flush=True)


if __name__ == "__main__":
    main()
