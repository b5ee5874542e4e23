"""`hasten prepare`: run once what a plan's techniques need, into a folder that loads like a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import common


def prepare(
    model: Annotated[
        str | None,
        typer.Argument(help="Known name, Hugging Face folder, or .gguf file. [default: the plan's]"),
    ] = None,
    use: common.Use = None,
    plan: common.PlanFile = None,
    dtype: common.Dtype = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; must not exist.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            help="UTF-8 text to calibrate on instead of the documentation corpus, one document per file. Repeatable.",
        ),
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Calibrate, quantise, search or train what the plan's techniques need, and keep it with the model and the plan.

    The folder is loaded wherever a model can be named. A killed run goes on where it was.

    Examples:

      hasten prepare smollm2-135m-instruct --use gptq -o smollm2-gptq

      hasten prepare --use sleb:remove=2 --use adamas -o small --calibration notes.txt

      hasten chat --model smollm2-gptq
    """
    from hasten.core.errors import HastenError, PlanError
    from hasten.lm.prepare import prepare as run
    from hasten.models import store
    from hasten.models.checkpoint import open_checkpoint

    chosen = common.make_plan(model, use, plan, dtype)
    if output is None:
        raise PlanError("where to? give the folder to write with -o")
    tokens: list[list[int]] | None = None
    if calibration:
        tokenizer = open_checkpoint(store.resolve(chosen.model)).tokenizer()
        tokens = []
        for path in calibration:
            try:
                tokens.append(list(tokenizer.encode(path.read_text(encoding="utf-8"))))
            except (OSError, UnicodeDecodeError) as error:
                raise HastenError(f"{path} cannot be read as UTF-8 text: {error}") from None
    prepared = run(chosen, output, tokens)
    if as_json:
        common.print_json({"path": str(prepared.folder), **prepared.provenance})
        return
    made = prepared.provenance["request"]["artefacts"]
    typer.echo(prepared.folder)
    typer.echo(
        f"{prepared.plan.label()}: " + (", ".join(made) if made else "nothing had to be computed beforehand"),
        err=True,
    )
