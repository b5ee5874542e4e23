"""Which systems work together: `python -m benchmarks.composition --json FILE`.

Every pair of language-model techniques with code is put into one plan. A pair that the slots or a declared conflict
rule out is written down with that reason; every other pair runs on the default model in float32: prompts of mixed
lengths, two with a common start, in one batch. It works if the answers are complete and finite, a second run gives the
same tokens, a request cancelled midway leaves no page behind, and, where both call themselves lossless, the tokens are
those of the plain model. ``--publish`` writes docs/compatibility.md. A run that was stopped goes on with the pairs that
``--json`` does not hold yet. The same checks run on a tiny model in tests/contracts/test_pairs.py.

Techniques are given settings with which they act on short prompts and calibrate quickly (`SETTINGS`): this shows that a
pair works, not what it is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from hasten.catalog import loader
from hasten.core.errors import ConflictError, HastenError, PlanError, UnsupportedError
from hasten.core.plan import Plan
from hasten.core.slots import SLOTS
from hasten.core.technique import Technique
from hasten.lm.llm import LLM
from hasten.lm.request import FinishReason, SamplingParams
from hasten.measure.store import write_text

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
TOKENS = 12
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)

# What makes a technique act on prompts of a few hundred tokens, or calibrate quickly.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamas": {"budget": 32},
    "delta": {"pages": 6, "recent": 2, "full": (0, 1, 10, 20)},
    "flash_attention": {"min_rows": 2},
    "flash_attention2": {"min_rows": 2},
    "gptq": {"samples": 4, "sample_length": 128},
    "marlin": {"samples": 4, "sample_length": 128},
    "quik": {"samples": 4, "sample_length": 128},
    "endor": {"samples": 4, "sample_length": 128},
    "prompt_lookup": {
        "adaptive": False
    },  # else lengths follow the clock, and lossy attention follows the lengths
    "quantspec": {"group": 32, "draft_tokens": 2},
    "resa": {"min_blocks": 4, "every": 4},
    "sleb": {"remove": 1, "samples": 2, "sample_length": 64},
    "token_select": {"n_init": 16, "n_local": 64, "k": 64, "chunk": 64},
}


@dataclass(frozen=True)
class Outcome:
    """What became of a pair. ``why`` is the reason for ``refused`` and what was wrong for ``fails``."""

    first: str
    second: str
    state: Literal["works", "refused", "fails"]
    why: str = ""
    lossless: bool = False


def built() -> list[str]:
    """Slugs of the language-model systems that have code, in catalogue order, and the drafter without a model."""
    records = (*loader.records().values(), loader.record("prompt_lookup"))
    return [
        r.slug
        for r in records
        if r.state != "planned"
        and any(SLOTS[name].engine == "lm" and SLOTS[name].interface for name in r.slots)
    ]


def pairs(slugs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every unordered pair."""
    return itertools.combinations(slugs, 2)


def refusal(use: Sequence[Technique]) -> str | None:
    """Why a plan of these techniques is refused before any work, or None."""
    try:
        Plan(techniques=tuple(use)).check()
    except (ConflictError, PlanError) as error:
        return str(error)
    return None


def prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random tokens: one prompt of each length, and one that shares most of the longest."""

    def ids(count: int, seed: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    alone = [ids(length, length) for length in lengths]
    return [*alone, alone[-1][: max(lengths) * 3 // 4] + ids(7, 99)]


def answers(llm: LLM, given: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Greedy answers of one batch; `AssertionError` unless each is complete and finite."""
    found = []
    for completion in llm.generate([list(ids) for ids in given], GREEDY):
        (sample,) = completion.samples
        assert sample.error is None, sample.error
        assert sample.finish is FinishReason.LENGTH, f"ended with {sample.finish}"
        assert len(sample.token_ids) == TOKENS, f"{len(sample.token_ids)} tokens instead of {TOKENS}"
        assert all(math.isfinite(entry.logprob) for entry in sample.logprobs), "logprobs are not finite"
        found.append(sample.token_ids)
    return found


def check(
    load: Callable[[Sequence[Technique]], LLM],
    use: Sequence[Technique],
    given: Sequence[Sequence[int]],
    plain: Sequence[tuple[int, ...]],
) -> Outcome:
    """Run a pair. ``plain``: what the model answers without techniques, for pairs that are lossless."""
    first, second = (technique.slug for technique in use)
    lossless = all(technique.lossless for technique in use)
    why = refusal(use)
    if why is not None:
        return Outcome(first, second, "refused", why)
    try:
        llm = load(use)
        want = answers(llm, given)
        llm.forget_prefixes()
        assert answers(llm, given) == want, "a second run gave other tokens"
        assert not lossless or want == list(plain), "lossless, but not the plain model's tokens"
        _cancelled(llm, given)
    except (UnsupportedError, ConflictError) as error:
        return Outcome(first, second, "refused", str(error))
    except (AssertionError, HastenError) as error:
        return Outcome(first, second, "fails", f"{type(error).__name__}: {error}")
    return Outcome(first, second, "works", lossless=lossless)


def _cancelled(llm: LLM, given: Sequence[Sequence[int]]) -> None:
    """`AssertionError` if a batch of which one request is cancelled midway keeps a page."""
    engine = llm.engine
    requests = [engine.submit(list(ids), GREEDY) for ids in given]
    for _ in range(3):
        engine.step()
    engine.cancel(requests[-1])
    engine.run()
    failed = [r.failure for r in requests if r.failure is not None]
    assert not failed, f"a request failed: {failed[0]}"
    llm.forget_prefixes()
    assert engine.cache.pool.free == engine.cache.pool.count, "pages were not given back"


def techniques(slugs: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> list[Technique]:
    return [loader.technique(slug)(**settings.get(slug, {})) for slug in slugs]


def page(outcomes: Sequence[Outcome], slugs: Sequence[str]) -> str:
    """The matrix and the reasons as Markdown."""
    found = {frozenset((o.first, o.second)): o for o in outcomes}
    marks = {"works": "yes", "refused": "–", "fails": "**no**"}

    def cell(row: str, column: str) -> str:
        outcome = found.get(frozenset((row, column)))
        if row == column or outcome is None:
            return ""
        return "lossless" if outcome.lossless else marks[outcome.state]

    lines = [
        "# What works together",
        "",
        "Written by `python -m benchmarks.composition --publish`; do not edit. Each pair ran on the default model in",
        "float32: *yes* is a pair whose answers were complete, finite and repeatable and that gave all its pages back,",
        "*lossless* one that also gave the plain model's tokens; – one that is refused, for the reason below.",
        "",
        "| | " + " | ".join(slugs[1:]) + " |",
        "| --- |" + " --- |" * (len(slugs) - 1),
    ]
    for index, row in enumerate(slugs[:-1]):
        cells = ["" if at < index + 1 else cell(row, column) for at, column in enumerate(slugs) if at > 0]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    reasons = [o for o in outcomes if o.state != "works"]
    if reasons:
        lines += ["", "## Why not", "", "| pair | reason |", "| --- | --- |"]
        lines += [f"| {o.first}, {o.second} | {o.why.replace('|', '/')} |" for o in reasons]
    return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace) -> None:
    slugs = arguments.systems or built()
    done: list[Outcome] = []
    if arguments.json is not None and arguments.json.exists():
        done = [Outcome(**record) for record in json.loads(arguments.json.read_text(encoding="utf-8"))]
    ready = {(o.first, o.second) for o in done}
    left = [pair for pair in pairs(slugs) if pair not in ready]

    def load(use: Sequence[Technique]) -> LLM:
        return LLM(Plan(techniques=tuple(use), dtype="float32", engine={"kv_tokens": 8192, "max_batch": 8}))

    given = prompts((1, 40, 200, 400), 40000)
    plain = answers(load(()), given)
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        task = bar.add_task("pairs", total=len(left))
        for pair in left:
            bar.update(task, description=f"{pair[0]}, {pair[1]}")
            outcome = check(load, techniques(pair, SETTINGS), given, plain)
            if outcome.state == "fails":
                console.print(f"{pair[0]}, {pair[1]}: {outcome.why}")
            done.append(outcome)
            if arguments.json is not None:
                write_text(arguments.json, json.dumps([asdict(o) for o in done], indent=1) + "\n")
            bar.advance(task)
    if arguments.publish:
        write_text(PAGE, page([o for o in done if {o.first, o.second} <= set(slugs)], slugs))
    counts = {state: sum(o.state == state for o in done) for state in ("works", "refused", "fails")}
    print(json.dumps(counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", help="only these (default: all that have code)")
    parser.add_argument("--json", type=Path, help="keep the outcomes there; pairs it holds are not run again")
    parser.add_argument("--publish", action="store_true", help=f"write {PAGE.name}")
    main(parser.parse_args())
