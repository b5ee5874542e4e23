"""`hasten chat`: a conversation in the terminal. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import common

if TYPE_CHECKING:
    from hasten.lm.llm import LLM
    from hasten.lm.request import SamplingParams

HELP = "/reset starts over, /undo drops the last exchange, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def chat(
    model: common.Model = None,
    use: common.Use = None,
    plan: common.PlanFile = None,
    dtype: common.Dtype = None,
    max_tokens: common.MaxTokens = 512,
    temperature: common.Temperature = 0.2,
    top_k: common.TopK = 0,
    top_p: common.TopP = 0.9,
    min_p: common.MinP = 0.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
) -> None:
    """Talk with a model.

    Examples:

      hasten chat

      hasten chat --model ./my-model.gguf --system "Answer in one sentence."
    """
    import io

    from rich.console import Console

    from hasten.lm.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    console = Console(stderr=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 make a line that is refused, not the end of the conversation.
        sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history in `input`)
    with common.open_llm(common.make_plan(model, use, plan, dtype)) as llm:
        console.print(f"[dim]{HELP}[/dim]")
        converse(llm, params, system, console)


def converse(llm: LLM, params: SamplingParams, system: str | None, console: Any) -> None:
    """Read, answer, repeat until end of input. The history holds what was really said, also when interrupted."""
    start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print(f"\n[dim]{HELP}[/dim]")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line == "/undo":
            del messages[max(len(start), len(messages) - 2) :]
        elif line.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            question = {"role": "user", "content": line}
            try:
                said = answer(llm, [*messages, question], params, console)
            except KeyboardInterrupt:  # pressed again while the first one was handled
                continue
            if said is not None:
                messages += [question, {"role": "assistant", "content": said}]


def answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams, console: Any) -> str | None:
    """Stream one answer; return what was printed, or None if nothing was said (refused, or stopped before it began).

    Ctrl-C cancels the request and keeps the part that is on the screen.
    """
    from hasten.core.errors import RequestError

    parts: list[str] = []
    try:
        with contextlib.closing(llm.chat(messages, params, stream=True)) as stream:
            for delta in stream:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        console.print("\n[dim](stopped)[/dim]")
        return "".join(parts) or None
    except RequestError as error:
        console.print(f"{error}; /reset starts over", style="red", markup=False)
        return None
    return "".join(parts)
