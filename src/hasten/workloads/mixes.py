"""Offline jobs whose density (arithmetic over reading) and sharing of prompts are chosen.

Two kinds of requests, as in BlendServe (Zhao et al., 2024, arXiv 2411.16102, section 6): *classify*: long prompts, many
with a common document, short answers; *write*: short prompts of their own, long answers. How long a common part is
sets the sharing, how many requests write sets the density.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.core.errors import MeasureError
from hasten.lm.scheduling.resources import Rates
from hasten.lm.scheduling.simulator import Asked


@dataclass(frozen=True)
class Kind:
    """Average tokens of prompt and answer; both vary by ``spread`` of that, evenly."""

    prompt: int
    output: int
    spread: float = 0.3


@dataclass(frozen=True)
class Shape:
    """A request before it has text: lengths, its group (-1: none) and how many tokens it shares with that."""

    prompt: int
    output: int
    group: int = -1
    shared: int = 0


def job(
    rates: Rates,
    *,
    requests: int,
    writing: float = 0.5,
    density: float | None = None,
    sharing: float,
    classify: Kind,
    write: Kind,
    group: int = 8,
    seed: int = 0,
) -> list[Shape]:
    """Shapes of a job in random order, with the density and sharing asked for as near as whole requests allow.

    writing: share of requests that write; density: instead of it, that of the job (arithmetic over reading at
    ``rates``). group: requests with the same common part. Raises `MeasureError` when no mix of the two kinds has that
    density, or their prompts cannot share so much.
    """
    rng = random.Random(seed)
    drawn = {
        kind: [
            (_around(rng, kind.prompt, kind.spread), _around(rng, kind.output, kind.spread))
            for _ in range(requests)
        ]
        for kind in (classify, write)
    }

    def mix(writing: int) -> list[Shape]:
        reading = [Shape(p, d, i // group) for i, (p, d) in enumerate(drawn[classify][: requests - writing])]
        writers = [Shape(p, d) for p, d in drawn[write][:writing]]
        return share(reading, writers, sharing, group)

    chosen = mix(round(writing * requests) if density is None else _writers(mix, requests, density, rates))
    found = saved(chosen) / sum(shape.prompt for shape in chosen)
    if abs(found - sharing) > 0.03:
        raise MeasureError(
            f"sharing {sharing} cannot be had in this mix: its prompts share at most {found:.3f}"
        )
    return sorted(chosen, key=lambda _: rng.random())


def _writers(mix: Callable[[int], list[Shape]], requests: int, density: float, rates: Rates) -> int:
    """How many requests must write: the more do, the lower the density."""
    most, least = _density(mix(0), rates), _density(mix(requests), rates)
    if not least <= density <= most:
        raise MeasureError(f"density {density} cannot be had: {least:.3g} to {most:.3g} with these lengths")
    low, high = 0, requests
    while low < high:
        middle = (low + high) // 2
        if _density(mix(middle), rates) > density:
            low = middle + 1
        else:
            high = middle
    return low


def share(reading: Sequence[Shape], writers: Sequence[Shape], sharing: float, group: int) -> list[Shape]:
    """Let the prompts of each group have a common part, as long as the job's sharing asks for (or as can be)."""
    total = sum(shape.prompt for shape in (*reading, *writers))
    least = {g: min(s.prompt for s in reading if s.group == g) - 1 for g in {s.group for s in reading}}
    most = sum(least[shape.group] for shape in reading) - sum(least.values())
    part = 0.0 if most <= 0 else min(1.0, sharing * total / most)
    return [
        *(Shape(s.prompt, s.output, s.group, int(part * least[s.group])) for s in reading),
        *writers,
    ]


def saved(shapes: Sequence[Shape]) -> int:
    """Prompt tokens that need not be computed if every common part is computed once."""
    first: dict[int, int] = {}
    total = 0
    for shape in shapes:
        if shape.group >= 0:
            total += shape.shared if shape.group in first else 0
            first.setdefault(shape.group, shape.shared)
    return total


def _density(shapes: Sequence[Shape], rates: Rates) -> float:
    """Of the job, common parts computed once."""
    known: set[int] = set()
    comp = mem = 0.0
    for shape in shapes:
        comp += rates.prompt(shape.shared if shape.group in known else 0, shape.prompt)
        comp += rates.decode(shape.output)
        mem += rates.memory(shape.prompt, shape.output)
        if shape.group >= 0:
            known.add(shape.group)
    return comp / mem


def _around(rng: random.Random, mean: int, spread: float) -> int:
    return max(2, round(mean * (1 + spread * (2 * rng.random() - 1))))


def synthetic(shapes: Sequence[Shape], template: int = 16) -> list[Asked]:
    """The job with made-up tokens, for the simulator: each kind begins with ``template`` tokens of its own.

    No two prompts have more in common than their kind and their group say.
    """
    fresh = itertools.count(2)
    common: dict[int, list[int]] = {}
    made = []
    for shape in shapes:
        start = [int(shape.group >= 0)] * template
        if shape.group >= 0:
            document = common.setdefault(shape.group, [])
            document += [next(fresh) for _ in range(shape.shared - template - len(document))]
            start += document[: max(0, shape.shared - template)]
        rest = max(1, shape.prompt - len(start))
        made.append(Asked(start + [next(fresh) for _ in range(rest)], shape.output))
    return made
