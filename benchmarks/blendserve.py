"""Offline jobs with `blendserve` against fixed orders: `python -m benchmarks.blendserve --speed --json FILE`.

``--speed``: the `offline` workload on the engine, blendserve against depth-first, random and first come, first served
orders, paired and interleaved in one process. The engine runs arithmetic and reading one after the other, so what can
be seen here is sharing and composition of batches, not overlap; needs a quiet machine.

``--simulate`` (acceptance 2 and 3, and 4 as far as a model can say): four mixes of density and sharing; the real
scheduler, pages and prefix store, with time from the resource model, with and without perfect overlap, and percent of
the practical optimum. *Simulated*: no figure of it is a measurement.

``--scale`` (acceptance 5): real processor seconds in the scheduler for a job of ``--requests`` requests over the job's
simulated seconds, and the bytes of its prefix tree.

``--interference``: what a bandwidth-bound reader on another core costs products of matrices: whether overlap could pay
here (specification, "Faithful evaluation").
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import chosen, record, recording
from hasten import workloads
from hasten.core.artefact import ArtefactStore
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.kernels.peak import read_bandwidth
from hasten.lm.scheduling.blendserve import BlendServe, DualScanner
from hasten.lm.scheduling.continuous import ContinuousBatching
from hasten.lm.scheduling.offline import FixedOrder, OfflineOrder
from hasten.lm.scheduling.prefix_tree import Entry, PrefixTree
from hasten.lm.scheduling.resources import Rates
from hasten.lm.scheduling.scheduler import Scheduler
from hasten.lm.scheduling.simulator import Asked, Simulated, Simulator
from hasten.lm.settings import EngineSettings
from hasten.measure.environment import usable_cpus
from hasten.measure.interleave import measure_pairs, warm_up
from hasten.measure.statistics import Stopping
from hasten.workloads.mixes import Kind, job, synthetic

MIXES = ((1.4, 0.35), (0.9, 0.35), (1.4, 0.05), (0.9, 0.05))
RATES = Rates(token=2e-3, pair=6.5e-7, read=2e-5)  # under which short jobs have such densities
FIXED = 0.01  # seconds of a step that neither resource explains: weights
ARMS: dict[str, tuple[Technique, ...]] = {
    "dfs": (OfflineOrder(),),
    "random": (OfflineOrder(order="random"),),
    "shortest": (OfflineOrder(order="shortest"),),
    "longest": (OfflineOrder(order="longest"),),
    "fcfs": (),
}


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per rival: ratio of times for the whole job, sharing of both, share of identical tokens."""
    workload = workloads.get("offline")
    options = {"requests": args.requests, "sharing": args.sharing, "reference": False}
    ours = workload.open(Plan(args.model, (BlendServe(lengths=args.lengths),)), options)
    for name in args.against:
        rival = workload.open(Plan(args.model, ARMS[name]), options)
        warm_up(rival, ours, 1)
        ratio = measure_pairs(rival, ours, Stopping(max_pairs=args.pairs)).interval()
        yield {
            "against": name,
            "speedup": ratio.to_dict(),
            "shared": {"blendserve": ours.run().detail["shared"], name: rival.run().detail["shared"]},
            "identical_tokens": [ours.quality(), rival.quality()],
            "facts": {
                k: v for k, v in ours.facts().items() if k in ("job_density", "groups_moved", "read_seconds")
            },
        }
        rival.close()
    ours.close()


def schedulers() -> dict[str, Scheduler]:
    """A fresh scheduler of each kind; those with rates get the simulation's."""
    store = ArtefactStore(Path("unused"), "simulated")
    found: dict[str, Scheduler] = {"dfs": FixedOrder(OfflineOrder())}  # first: it sets the optimum
    for order in ("random", "shortest", "longest"):
        found[order] = FixedOrder(OfflineOrder(order=order))
    found["fcfs"] = ContinuousBatching()
    for lengths in ("sampled", "limit"):
        scanner = DualScanner(BlendServe(lengths=lengths), store)
        scanner.rates = RATES
        found[f"blendserve {lengths}"] = scanner
    return found


def mix(density: float, sharing: float, requests: int) -> list[Asked]:
    """The job of one mix."""
    shapes = job(
        RATES, requests=requests, density=density, sharing=sharing, classify=Kind(600, 8), write=Kind(60, 300)
    )
    return synthetic(shapes)


def run(scheduler: Scheduler, asked: list[Asked]) -> Simulated:
    settings = EngineSettings(page_size=16, max_batch=32, max_step_tokens=128)
    return Simulator(scheduler, RATES, settings, pages=500).run(asked)


def simulate(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per mix and scheduler."""
    for density, sharing in MIXES:
        asked = mix(density, sharing, args.requests)
        best: float | None = None
        for name, scheduler in schedulers().items():
            done = run(scheduler, asked)
            if name == "dfs":
                # Perfect overlap of both resources at the best sharing; the steps that memory allows cost as always.
                best = max(sum(done.compute), sum(done.memory)) + FIXED * len(done.rows)
            overlapped = done.seconds(FIXED, overlap=True)
            yield {
                "simulated": True,
                "density": density,
                "sharing": sharing,
                "scheduler": name,
                "shared": done.sharing,
                "seconds": done.seconds(FIXED),
                "overlapped_seconds": overlapped,
                "percent_of_optimum": None if best is None else 100 * best / overlapped,
                "variation": dict(zip(("compute", "memory"), done.variation(16), strict=True)),
                "preemptions": done.preemptions,
                "scheduling_seconds": done.scheduling,
            }


def scale(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cost of scheduling a long job."""
    asked = mix(0.9, 0.35, args.requests)
    tracemalloc.start()
    began = time.perf_counter()
    tree = PrefixTree([Entry(one.prompt, 64.0) for one in asked], 16)
    seconds = time.perf_counter() - began
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    nodes = len(tree.nodes())
    del tree
    scheduler = schedulers()["blendserve sampled"]
    done = run(scheduler, asked)
    simulated = done.seconds(FIXED)
    yield {
        "simulated": True,
        "requests": args.requests,
        "tree_bytes": held,
        "tree_nodes": nodes,
        "tree_seconds": seconds,  # traced: slower than it is
        "scheduling_seconds": done.scheduling,
        "job_seconds": simulated,
        "share": done.scheduling / simulated,
    }


def _stream(started: Event, stop: Event, cpu: int) -> None:
    """Read memory on one core until told to stop."""
    os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    read_bandwidth(1)  # allocates what is read
    started.set()
    while not stop.is_set():
        read_bandwidth(1)


def _multiply(seconds: float) -> float:
    """Products of 512 rows with a layer's weight per second, on this core."""
    x, w = torch.randn(512, 576), torch.randn(576, 1536)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            x @ w
        done += 10
    return done / (time.perf_counter() - began)


def interference(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Slowdown of products while the other core streams."""
    cpus = usable_cpus()
    if len(cpus) < 2:
        yield {"skipped": "one core"}
        return
    os.sched_setaffinity(0, {cpus[0]})
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    alone, beside = [], []
    for _ in range(args.pairs):
        alone.append(_multiply(0.5))
        started, stop = context.Event(), context.Event()
        reader = context.Process(target=_stream, args=(started, stop, cpus[1]))
        reader.start()
        started.wait()
        beside.append(_multiply(0.5))
        stop.set()
        reader.join()
    ratios = [b / a for a, b in zip(alone, beside, strict=True)]
    yield {"products_beside_reading": statistics.median(ratios), "all": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"speed": speed, "simulate": simulate, "scale": scale, "interference": interference}
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--requests", type=int, default=64, help="of a job; --simulate wants 800, --scale 100000"
    )
    parser.add_argument("--sharing", type=float, default=0.35, help="of --speed")
    parser.add_argument("--lengths", choices=("sampled", "limit"), default="sampled", help="of --speed")
    parser.add_argument("--against", nargs="+", choices=tuple(ARMS), default=["dfs", "random", "fcfs"])
    parser.add_argument("--pairs", type=int, default=10, help="most pairs of runs")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    parts = chosen(parser, args, parts)
    with recording(args.threads, args.json) as result:
        for name, part in parts.items():
            record(result, name, part(args))


if __name__ == "__main__":
    main()
