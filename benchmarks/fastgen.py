"""Serving with `fastgen` against other schedulers: `python -m benchmarks.fastgen --curve --speed --json FILE`.

``--curve``: latency of a step by its tokens, of one sequence and of many (acceptance 6; facts a and b of the
specification), and the budgets that follow.

``--speed`` (acceptance 3): the `trace` workload with 8 clients, prompts of 1200 tokens, against each rival: ratios of
the 95th percentile of the time between tokens, of throughput and of the time to the first token, paired and
interleaved in one process; medians with intervals. Also how many cached tokens prompt chunks read again, O(P^2 / B).

``--clients`` (acceptance 4): effective throughput and misses over numbers of clients for all three agreements, whose
constants are fixed before: the first token within ``--patience`` times the time of an idle engine (measured once, the
same for all arms), then 2, 4 or 6 tokens per second.

``--poisson``: the same at given rates of arrival. ``--requests`` sizes a run. All of it needs a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recording import chosen, record, recording
from hasten import workloads
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.scheduling.fastgen import FastGen
from hasten.lm.scheduling.latency import measure_curve
from hasten.lm.scheduling.rivals import Orca, PrefillFirst, StaticBatch
from hasten.lm.scheduling.scheduler import Work
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.trace import RATES, TraceSession, unloaded_rate

ARMS: dict[str, tuple[Technique, ...]] = {
    "prefill_first": (PrefillFirst(),),
    "orca": (Orca(),),
    "static_batch": (StaticBatch(),),
    "continuous": (),
}


class Arm:
    """A session of the `trace` workload that counts what its prompt chunks read again."""

    def __init__(
        self, name: str, args: argparse.Namespace, techniques: tuple[Technique, ...], **options: Any
    ) -> None:
        plan = Plan(args.model, techniques, args.dtype, {"prefix_cache": False, "max_batch": 32})
        settings = {
            "prompt_tokens": args.prompt_tokens,
            "tokens": args.tokens,
            "requests": args.requests,
            "patience": args.patience,
            "reference": False,
            **options,
        }
        session = workloads.get("trace").open(plan, settings)
        assert isinstance(session, TraceSession)
        self.name, self.session = name, session
        self.read_again = self.steps = 0
        schedule = session.llm.engine.scheduler.schedule

        def watch() -> list[Work]:
            work = schedule()
            self.steps += bool(work)
            self.read_again += sum(w.start for w in work if w.start < w.sequence.prompt_length)
            return work

        session.llm.engine.scheduler.schedule = watch  # type: ignore[method-assign]

    def run(self) -> dict[str, float]:
        self.read_again = self.steps = 0
        found = dict(self.session.run().detail)
        return {**found, "read_again": float(self.read_again), "steps": float(self.steps)}


def idle_rate(args: argparse.Namespace) -> float:
    """Tokens per second an idle engine reads; one constant of the agreements of all arms."""
    arm = Arm("idle", args, (), prompt_rate=1.0, requests=1)
    rate = unloaded_rate(arm.session.llm, arm.session.items[0].prompt, rounds=3)
    arm.session.close()
    return rate


def curve(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Latency by tokens; one record per number of sequences."""
    arm = Arm("curve", args, (), prompt_rate=1.0, requests=1)
    runner = arm.session.llm.engine.runner
    for sequences in (1, 8, 32):
        found = measure_curve(runner, 512, sequences=sequences, rounds=args.rounds)
        fixed, token = found.line()
        yield {
            "sequences": sequences,
            **found.to_dict(),
            "tokens_per_second": [round(rate, 1) for rate in found.throughput()],
            "budgets": {str(e): found.budget(e) for e in (0.8, 0.9, 0.95)},
            "fixed_seconds": fixed,
            "token_seconds": token,
        }
    arm.session.close()


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per rival: ratios of what each of them measured in the same round."""
    rate = idle_rate(args)
    ours = Arm("fastgen", args, (FastGen(budget=args.budget),), prompt_rate=rate)
    for name in args.against:
        rival = Arm(name, args, ARMS[name], prompt_rate=rate)
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        for number in range(args.rounds):
            pair = {arm.name: arm.run() for arm in ((ours, rival) if number % 2 == 0 else (rival, ours))}
            rounds.append((pair["fastgen"], pair[name]))
        ratios = {
            "token_latency_p95": [
                theirs["token_latency_p95"] / mine["token_latency_p95"] for mine, theirs in rounds
            ],
            "throughput": [
                mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in rounds
            ],
            "first_token_p95": [
                theirs["first_token_p95"] / mine["first_token_p95"] for mine, theirs in rounds
            ],
        }
        yield {
            "against": name,
            "budget": ours.session.facts()["step_budget"],
            "speedup": {what: median_interval(values).to_dict() for what, values in ratios.items()},
            "fastgen": rounds[-1][0],
            name: rounds[-1][1],
            "identical_tokens": [ours.session.quality(), rival.session.quality()],
        }
        rival.session.close()
    ours.session.close()


def loads(args: argparse.Namespace, load: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Effective throughput of every arm under each load; one run each, arms in turn."""
    rate = idle_rate(args)
    best: dict[tuple[str, int], float] = {}
    for options in load:
        for name, techniques in {"fastgen": (FastGen(budget=args.budget),), **ARMS}.items():
            if name not in ("fastgen", *args.against):
                continue
            arm = Arm(name, args, techniques, prompt_rate=rate, **options)
            found = arm.run()
            arm.session.close()
            for promised in RATES:
                key = name, promised
                best[key] = max(best.get(key, 0.0), found[f"effective_{promised}"])
            yield {"scheduler": name, **options, "prompt_rate": rate, **found}
    yield {
        "peak_effective": {
            str(promised): {name: peak for (name, other), peak in best.items() if other == promised}
            for promised in RATES
        }
    }


def clients(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A closed loop of 1 to 16 clients."""
    return loads(args, [{"clients": count} for count in args.numbers])


def poisson(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """An open loop, even and in bursts."""
    kinds = [{"arrivals": kind, "rate": rate} for kind in ("poisson", "bursty") for rate in args.rates]
    return loads(args, kinds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"curve": curve, "speed": speed, "clients": clients, "poisson": poisson}
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument(
        "--requests", type=int, default=32, help="of a run; 128 for a headline, 24 short ones in CI"
    )
    parser.add_argument("--budget", type=int, help="tokens of a step; calibrated without it")
    parser.add_argument("--patience", type=float, default=4.0)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of clients")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="requests per second")
    parser.add_argument("--against", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument(
        "--rounds", type=int, default=6, help="pairs of runs of --speed (6 at least), rounds of --curve"
    )
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    parts = chosen(parser, args, parts)
    with recording(args.threads, args.json) as result:
        result |= {
            "options": {key: value for key, value in vars(args).items() if key != "json"},
        }
        for name, part in parts.items():
            record(result, name, part(args))


if __name__ == "__main__":
    main()
