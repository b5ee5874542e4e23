"""What is run: the cases of ``--cases``, the jobs they need and the figures read from each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hasten.core.errors import UnknownNameError
from hasten.models.tokenizer import Tokenizer
from hasten.workloads.shared_prefix import SharedPrefixOptions, documents, task
from hasten.workloads.text import Text

Run = Mapping[str, Any]
"""One run: an `Answer` as a mapping; jobs in fresh processes add ``start`` (seconds to the first token), ``peak_mb``
and ``load_peak_mb``."""


@dataclass(frozen=True)
class Figure:
    """A figure of a job's runs and the case that it belongs to."""

    case: str
    label: str
    unit: str
    better: Literal["higher", "lower"]
    of: Callable[[Run], float] = field(compare=False)
    bound: bool = False  # whether reading weights and cache from memory bounds it


@dataclass(frozen=True)
class Job:
    """``prompts`` prompts of ``length`` tokens at once, ``tokens`` new tokens each.

    shared: leading tokens that all prompts have in common (then questions of their own follow). fresh: every run in a
    process of its own.
    """

    name: str
    prompts: int
    length: int
    tokens: int
    shared: int = 0
    fresh: bool = False
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much the cases do. Lengths in tokens."""

    decode: tuple[int, ...] = (64, 512)
    prefill: tuple[int, ...] = (512, 4096)
    long: int = 4096
    batch: tuple[int, ...] = (16, 32)
    batch_prompt: int = 128
    prefix: int = 2048
    questions: int = 16
    start: int = 64
    tokens: int = 64
    quality: int = 8  # prompts answered, and texts scored


def decode_speed(run: Run) -> float:
    """Tokens a second after every prompt's first one."""
    return float(run["late"] / (run["total"] - run["first"]))


def _single(length: int, sizes: Sizes, figure: Figure) -> Job:
    return Job(f"single-{length}", 1, length, sizes.tokens, figures=(figure,))


def _decode(case: str, length: int) -> Figure:
    return Figure(case, f"decode, context {length}", "tok/s", "higher", decode_speed, bound=True)


def _prefill(length: int) -> Figure:
    return Figure(
        "prefill", f"prefill of {length}", "tok/s", "higher", lambda run: float(length / run["first"])
    )


def _batch(count: int, sizes: Sizes) -> Job:
    figure = Figure("batch", f"decode, batch {count}", "tok/s", "higher", decode_speed)
    return Job(f"batch-{count}", count, sizes.batch_prompt, sizes.tokens, figures=(figure,))


def _shared(sizes: Sizes) -> Job:
    label = f"{sizes.questions} questions on a shared prefix of {sizes.prefix}"
    new = sizes.questions * sizes.tokens
    figure = Figure("shared", label, "tok/s", "higher", lambda run: float(new / run["total"]))
    return Job("shared", sizes.questions, sizes.prefix, sizes.tokens, shared=sizes.prefix, figures=(figure,))


def _fresh(sizes: Sizes, figure: Figure) -> Job:
    return Job("fresh", 1, sizes.start, sizes.tokens, fresh=True, figures=(figure,))


_CASES: dict[str, Callable[[Sizes], list[Job]]] = {
    "decode": lambda s: [_single(n, s, _decode("decode", n)) for n in s.decode],
    "prefill": lambda s: [_single(n, s, _prefill(n)) for n in s.prefill],
    "batch": lambda s: [_batch(n, s) for n in s.batch],
    "shared": lambda s: [_shared(s)],
    "long": lambda s: [_single(s.long, s, _decode("long", s.long))],
    "start": lambda s: [
        _fresh(
            s, Figure("start", "process start to first token", "ms", "lower", lambda run: 1e3 * run["start"])
        )
    ],
    "memory": lambda s: [
        _fresh(
            s, Figure("memory", "peak memory of decoding", "MiB", "lower", lambda run: float(run["peak_mb"]))
        )
    ],
}
CASES = tuple(_CASES)


def jobs(cases: Sequence[str] = CASES, sizes: Sizes | None = None) -> list[Job]:
    """The jobs of ``cases``; cases that can be read from the same runs share a job. `UnknownNameError` for no case."""
    found: dict[str, Job] = {}
    for case in dict.fromkeys(cases):
        if case not in _CASES:
            raise UnknownNameError("case", case, CASES, "cases: " + ", ".join(CASES))
        for job in _CASES[case](sizes or Sizes()):
            known = found.get(job.name)
            found[job.name] = replace(job, figures=(*known.figures, *job.figures)) if known else job
    return list(found.values())


class Prompts:
    """Each job's prompts, a different set for every run, the same for every engine: the corpus's test split."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = Text(tokenizer)

    def of(self, job: Job, runs: int) -> list[list[list[int]]]:
        """[run][prompt][token]. `MeasureError` when the corpus is too small for so many runs."""
        if job.shared:
            text = documents(self.text.tokenizer, job.prompts)
            options = SharedPrefixOptions(prefix_tokens=job.shared, questions=job.prompts)
            return [task(text, number, options).prompts() for number in range(runs)]
        windows = self.text.windows(job.length, job.prompts * runs)
        return [windows[start : start + job.prompts] for start in range(0, len(windows), job.prompts)]
