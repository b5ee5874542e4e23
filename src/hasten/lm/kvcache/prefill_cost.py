"""What computing a prompt costs, by how much of it is cached: a measured grid with bilinear interpolation.

`PrefillCost` is the T(alpha, beta) of RAGCache (Jin et al., 2024, arXiv 2404.12457, section 5.1): seconds to read
beta new tokens behind alpha cached ones.
"""

from __future__ import annotations

import json
import platform
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.core.errors import ArtefactError, RequestError
from hasten.lm.chunk import Chunk

if TYPE_CHECKING:
    from hasten.lm.engine import Engine

CACHED = (0, 512, 2048)
NEW = (32, 256, 1024)
_ROWS = 512  # of a point: short prompts are timed more often
_FILE = "prefill.json"


@dataclass(frozen=True)
class PrefillCost:
    """seconds[i][j]: of reading new[j] tokens behind cached[i]. Both axes ascend; beyond them the last slope holds."""

    cached: tuple[int, ...]
    new: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, axis in (("cached", self.cached), ("new", self.new)):
            if not axis or any(a >= b for a, b in pairwise(axis)):
                raise ValueError(f"{name} = {axis}: give at least one number, ascending")
        if len(self.seconds) != len(self.cached) or any(len(row) != len(self.new) for row in self.seconds):
            raise ValueError(f"seconds must be {len(self.cached)} rows of {len(self.new)}")
        if not all(0 < value < float("inf") for row in self.seconds for value in row):
            raise ValueError("seconds must be positive and finite")

    def __call__(self, alpha: float, beta: float) -> float:
        """Seconds for ``beta`` new tokens behind ``alpha`` cached ones; at least a tenth of linear in ``beta``."""
        i, x = _cell(self.cached, alpha)
        j, y = _cell(self.new, beta)
        i1, j1 = min(i + 1, len(self.cached) - 1), min(j + 1, len(self.new) - 1)
        t = self.seconds
        low, high = (t[r][j] * (1 - y) + t[r][j1] * y for r in (i, i1))
        floor = 0.1 * t[0][-1] * beta / self.new[-1]  # noise may slope a cell downwards
        return max(low * (1 - x) + high * x, floor)

    def save(self, folder: Path) -> None:
        text = json.dumps({"cached": self.cached, "new": self.new, "seconds": self.seconds})
        (folder / _FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PrefillCost:
        """Raises `ArtefactError` when the file is not a profile."""
        try:
            found: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            rows = tuple(tuple(map(float, row)) for row in found["seconds"])
            return cls(tuple(found["cached"]), tuple(found["new"]), rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{folder / _FILE} is not a prefill profile ({error}); delete {folder}"
            ) from None

    @classmethod
    def estimate(cls, parameters: float, attention: float) -> PrefillCost:
        """The shape of the cost from operation counts, in units of no clock: two corners of a bilinear function.

        parameters: multiplications of a token outside attention. attention: of a token per token it attends to.
        """

        def work(alpha: int, beta: int) -> float:
            return beta * (parameters + attention * (alpha + beta / 2))

        axis = (1, 1024, 4096)
        return cls((0, 4096), axis, tuple(tuple(work(a, b) for b in axis) for a in (0, 4096)))


def _cell(axis: Sequence[int], value: float) -> tuple[int, float]:
    """The cell of ``value`` and where in it (0..1; outside when beyond the axis)."""
    if len(axis) == 1:
        return 0, 0.0
    i = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


def measure(
    engine: Engine, cached: Sequence[int] = CACHED, new: Sequence[int] = NEW, rows: int = _ROWS
) -> PrefillCost:
    """Time the engine's own prefill on the grid, as far as its context and its free pages reach.

    rows: tokens to read for each point, at least; a point that takes several prompts is the least of their times.
    The tokens are random; time does not depend on them. Raises `RequestError` when not even two pages are free.
    """
    size = engine.cache.page_size
    room = min(engine.context, engine.cache.pool.free * size) - size
    if room < size:
        raise RequestError("measuring prefill needs free KV pages: raise kv_tokens or kv_memory_mb")
    new = sorted({min(n, max(1, room // 2)) for n in new})
    cached = sorted({min(a, room - new[-1]) // size * size for a in cached})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(engine.vocabulary, (cached[-1] + new[-1],), generator=generator).tolist()
    root = engine.cache.open(engine.new_id())
    table: list[tuple[float, ...]] = []
    try:
        engine.cache.attach(root)
        for alpha in cached:
            _read(engine, root, ids, alpha)
            times = [[_timed(engine, root, ids, alpha + n) for _ in range(-(-rows // n))] for n in new]
            table.append(tuple(min(row) for row in times))
    finally:
        _close(engine, root)
    return PrefillCost(tuple(cached), tuple(new), tuple(table))


def _timed(engine: Engine, root: Any, ids: list[int], stop: int) -> float:
    """Seconds to read up to ``stop`` from where ``root`` is; ``root`` stays there."""
    kv = engine.cache.fork(root, engine.new_id())
    engine.cache.detach(root)
    engine.cache.attach(kv)
    try:
        began = time.perf_counter()
        _read(engine, kv, ids, stop)
        return time.perf_counter() - began
    finally:
        _close(engine, kv)
        engine.cache.attach(root)


def _read(engine: Engine, kv: Any, ids: list[int], stop: int) -> None:
    for start in range(kv.length, stop, engine.settings.max_step_tokens):
        end = min(start + engine.settings.max_step_tokens, stop)
        if not engine.cache.reserve(kv, start, end):
            raise RequestError("the KV pages that are free do not hold the prompt to be timed")
        engine.runner.run([Chunk(kv, start, ids[start:end], range(start, end), 1 if end == stop else 0)])


def _close(engine: Engine, kv: Any) -> None:
    engine.cache.close(kv)
    engine.runner.forget(kv.id)


def cpu_name() -> str:
    """What the CPU calls itself, for telling machines apart; its architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
