"""Options and helpers that several commands share. Imports nothing heavy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hasten.core.plan import Plan
    from hasten.lm.llm import LLM

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Known name, Hugging Face folder, or .gguf file.")
]
Use = Annotated[
    list[str] | None,
    typer.Option("--use", "-u", help="Technique, e.g. adamas or adamas:budget=128. Repeatable."),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Plan file (TOML); --model and --dtype override it, --use adds to it."),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="auto, float32 (exact reference) or bfloat16. [default: auto]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample among the k best tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Sample among the tokens that hold this probability mass.")
]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop tokens below this share of the best one's probability.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling reproducible.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Stop string. Repeatable.")]


def make_plan(model: str | None, use: list[str] | None, plan: Path | None, dtype: str | None) -> Plan:
    """The plan that the options describe, checked. ``use`` replaces a technique of the plan file, or adds one."""
    from dataclasses import replace

    from hasten.catalog.loader import technique
    from hasten.core.plan import Plan, parse_use

    base = Plan.read(plan, technique) if plan else Plan()
    extra = tuple(parse_use(text, technique) for text in use or ())
    kept = tuple(t for t in base.techniques if t.slug not in {e.slug for e in extra})
    return replace(
        base,
        model=base.model if model is None else model,
        dtype=base.dtype if dtype is None else dtype,
        techniques=kept + extra,
    ).check()


def open_llm(plan: Plan) -> LLM:
    """Load the plan's model, with a spinner on a terminal."""
    from rich.console import Console
    from rich.markup import escape

    from hasten.lm.llm import LLM

    with Console(stderr=True).status(escape(f"loading {plan.model} ({plan.label()})")):
        return LLM(plan=plan)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    json.dump(data, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")


def read_prompt(text: str) -> str:
    """The prompt itself, or standard input for ``-``. Raises `RequestError` for bytes that are not UTF-8."""
    from hasten.core.errors import RequestError

    if text != "-":
        # The shell hands over undecodable bytes as lone surrogates.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError("the prompt is not valid UTF-8; convert it first, e.g. with iconv")
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input is not valid UTF-8 ({error.reason} at byte {error.start}); "
            "convert it first, e.g. with iconv"
        ) from None


def read_text(path: Path) -> str:
    """A text file's content. Raises `RequestError` naming the file if there is none or it is not UTF-8."""
    from hasten.core.errors import RequestError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not valid UTF-8 ({error.reason} at byte {error.start}); convert it first, e.g. with iconv"
        ) from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
