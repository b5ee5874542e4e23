"""`hasten batch`: answer a file of OpenAI batch requests; resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import common


def batch(
    source: Annotated[Path, typer.Argument(help="Requests, one JSON object a line (OpenAI batch format).")],
    target: Annotated[Path, typer.Argument(help="Answers, appended one line each; run again to resume.")],
    model: common.Model = None,
    use: common.Use = None,
    plan: common.PlanFile = None,
    dtype: common.Dtype = None,
    as_json: common.AsJson = False,
) -> None:
    """Answer every request of a file, batched continuously.

    A line: {"custom_id": "q1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}}

    Killed in the middle, it goes on where it stopped when run again: no request is lost or answered twice. A broken
    line gets an error record; the rest is done.

    Examples:

      hasten batch in.jsonl out.jsonl

      hasten batch in.jsonl out.jsonl --use hydragen --model ./model.gguf
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hasten.lm.batch import read_jobs, run_batch

    chosen = common.make_plan(model, use, plan, dtype)
    read_jobs(source)  # a missing file is refused before the model is loaded
    console = Console(stderr=True)
    with (
        common.open_llm(chosen) as llm,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as bar,
    ):
        task = bar.add_task(source.name)
        answered, failed = run_batch(
            source,
            target,
            llm.answer_jobs,
            model=chosen.model,
            decode=lambda token: llm.tokenizer.decode([token], skip_special=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        common.print_json({"answered": answered - failed, "failed": failed, "output": str(target)})
    else:
        console.print(f"{answered - failed} answered, {failed} failed, in {target}")
