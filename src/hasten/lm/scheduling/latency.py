"""What a step costs by the number of its tokens: measured once per model, plan and machine, kept as an artefact.

Below the knee of throughput(tokens) a step is bound by reading weights, above it by arithmetic (Holmes et al., 2024,
arXiv 2401.08671, section 3.2).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.core.errors import ArtefactError, UnsupportedError
from hasten.kernels import level
from hasten.lm.chunk import Chunk
from hasten.weights.format import PackedLinear

if TYPE_CHECKING:
    from hasten.core.artefact import ArtefactStore
    from hasten.lm.kvcache.cache import SequenceKV
    from hasten.lm.runner import Runner

VERSION = 1  # of the measurement: raise it when curves of before should not be read any more
_FINE = 64  # tokens up to which the curve bends and sizes lie close together
_CALIBRATION_ID = -1  # of the sequences that calibration runs; the engine's count from 0


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of a step by its tokens, both ascending. Times are made monotone: more tokens never take less."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, tokens: tuple[int, ...], seconds: tuple[float, ...]) -> LatencyCurve:
        """Of measured minima, which noise can only raise: a time above a later one is lowered to it."""
        smooth: list[float] = []
        for value in reversed(seconds):
            smooth.append(min(value, smooth[-1]) if smooth else value)
        return cls(tokens, tuple(reversed(smooth)))

    def throughput(self) -> tuple[float, ...]:
        """Tokens per second of a step of each size."""
        return tuple(t / s for t, s in zip(self.tokens, self.seconds, strict=True))

    def budget(self, efficiency: float) -> int:
        """The smallest measured step whose throughput is at least ``efficiency`` times the best one's."""
        rates = self.throughput()
        wanted = efficiency * max(rates)
        return next(t for t, rate in zip(self.tokens, rates, strict=True) if rate >= wanted)

    def line(self) -> tuple[float, float]:
        """(seconds of a step without tokens, seconds per token): least squares of relative errors."""
        # Weighted by 1 / seconds^2, so that small steps count as much as large ones.
        weight = [1 / s**2 for s in self.seconds]
        total = sum(weight)
        mean_t = sum(w * t for w, t in zip(weight, self.tokens, strict=True)) / total
        mean_s = sum(w * s for w, s in zip(weight, self.seconds, strict=True)) / total
        spread = sum(w * (t - mean_t) ** 2 for w, t in zip(weight, self.tokens, strict=True))
        if spread == 0:
            return 0.0, mean_s / mean_t
        joint = sum(
            w * (t - mean_t) * (s - mean_s) for w, t, s in zip(weight, self.tokens, self.seconds, strict=True)
        )
        slope = joint / spread
        return mean_s - slope * mean_t, slope

    def to_dict(self) -> dict[str, list[Any]]:
        return {"tokens": list(self.tokens), "seconds": list(self.seconds)}


def sizes(limit: int) -> tuple[int, ...]:
    """Step sizes to measure: ``limit`` and the powers of two below, up to `_FINE` also the middles between them."""
    found = {limit}
    size = 1
    while size <= limit:
        found |= {size, size + size // 2} if size < _FINE else {size}
        size *= 2
    return tuple(sorted(n for n in found if n <= limit))


def measure_curve(
    runner: Runner,
    limit: int,
    *,
    sequences: int = 1,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyCurve:
    """Latency of steps of 1 to ``limit`` tokens, prompts of ``sequences`` sequences cut evenly; best of ``rounds``.

    Runs on the runner's own weights, pages and threads, with nothing else in the cache. Raises `UnsupportedError` when
    the cache cannot hold a step.
    """
    count = min(limit, runner.cache.context - 1)
    if count < 1:
        raise UnsupportedError("the KV cache holds no token to calibrate with; raise the KV memory")
    chosen = sizes(count)
    best = dict.fromkeys(chosen, float("inf"))
    for turn in range(rounds + 1):
        for size in chosen:
            if turn == 0 and size > _FINE:
                continue  # the first round warms up, and large steps are warm without it
            best[size] = min(best[size], _step_seconds(runner, size, min(sequences, size), clock))
    return LatencyCurve.of(chosen, tuple(best[size] for size in chosen))


def _step_seconds(runner: Runner, size: int, sequences: int, clock: Callable[[], float]) -> float:
    cache = runner.cache
    vocabulary = runner.decoder.config.vocab_size
    ids = torch.randint(vocabulary, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    cuts = [size * i // sequences for i in range(sequences + 1)]
    open_kvs: list[SequenceKV] = []
    chunks: list[Chunk] = []
    try:
        for number, (low, high) in enumerate(pairwise(cuts)):
            kv = cache.open(_CALIBRATION_ID - number)
            open_kvs.append(kv)
            if cache.free_rows == 0 or not cache.reserve(kv, 0, high - low):
                raise UnsupportedError(
                    f"the KV cache holds no step of {size} tokens of {sequences} sequences to calibrate with; "
                    "raise the KV memory, or lower max_step_tokens"
                )
            cache.attach(kv)
            chunks.append(Chunk(kv, 0, ids[low:high], range(high - low), 1))
        began = clock()
        runner.run(chunks)
        return clock() - began
    finally:
        for kv in open_kvs:
            cache.close(kv)
            runner.forget(kv.id)


def kept_curve(store: ArtefactStore, slug: str, runner: Runner, limit: int) -> LatencyCurve:
    """The curve of this runner on this machine: read from the artefact, or measured now and kept.

    Raises `ArtefactError` for a damaged artefact, and what `measure_curve` raises.
    """
    made_from = {"version": VERSION, "limit": limit, **described(runner)}

    def write(folder: Path) -> None:
        curve = measure_curve(runner, limit)
        (folder / "latency.json").write_text(json.dumps(curve.to_dict()) + "\n", encoding="utf-8")

    folder = store.build(f"{slug}-latency", made_from, write)
    try:
        data = json.loads((folder / "latency.json").read_text(encoding="utf-8"))
        curve = LatencyCurve(tuple(map(int, data["tokens"])), tuple(map(float, data["seconds"])))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtefactError(f"{folder} holds no latency curve ({error}); delete it") from None
    if not curve.tokens or len(curve.tokens) != len(curve.seconds) or min(curve.seconds) <= 0:
        raise ArtefactError(f"{folder} holds no latency curve; delete it")
    return curve


def described(runner: Runner) -> dict[str, Any]:
    """What the cost of a step depends on: machine, threads, weights, pages and who acts in a step."""
    decoder, cache = runner.decoder, runner.cache
    packed = [module for _, module in decoder.linears()]
    return {
        "cpu": _cpu(),
        "level": level(),
        "threads": torch.get_num_threads(),
        "layers": decoder.config.num_layers,
        "weights": sorted({type(module).__qualname__ for module in packed}),
        "weight_bytes": sum(m.weight_bytes() for m in packed if isinstance(m, PackedLinear)),
        "kv": [type(cache.format).__qualname__, cache.page_bytes, cache.page_size],
        "acting": [type(part).__qualname__ for part in (runner.kernel, runner.policy, *runner.hooks)],
    }


def _cpu() -> str:
    """The processor's name and how many of them this process may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} x{len(os.sched_getaffinity(0))}"
