"""`hasten generate`: one prompt in, text (streamed) or one JSON object out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import common


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: common.Model = None,
    use: common.Use = None,
    plan: common.PlanFile = None,
    dtype: common.Dtype = None,
    max_tokens: common.MaxTokens = 256,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message (not with --raw).")] = None,
    context: Annotated[
        list[Path] | None,
        typer.Option(
            "--context", "-c", help="Text file that the prompt asks about. Repeatable. Not with --raw."
        ),
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Generate from a prompt.

    Examples:

      hasten generate "Name three rivers in Europe."

      hasten generate "def fib(n):" --raw --max-tokens 64 --dtype float32 --json

      cat notes.txt | hasten generate - --use adamas:budget=256

      hasten generate "Which port does it use?" --context a.md --context b.md --use ape
    """
    from hasten.core.errors import IntegrityError, RequestError
    from hasten.lm.request import SamplingParams

    text = common.read_prompt(prompt)
    if raw and system is not None:
        raise RequestError("--system needs the chat template; drop --raw or --system")
    if raw and context:
        raise RequestError("--context needs the chat template; drop --raw or --context")
    contexts = [common.read_text(path) for path in context or ()]
    if not text and not raw:  # with --raw the model decides: some start from nothing but their start token
        raise RequestError("the prompt is empty: give some text")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    chosen = common.make_plan(model, use, plan, dtype)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with common.open_llm(chosen) as llm:
        if as_json:
            completion = (
                llm.generate([text], params)[0] if raw else llm.chat(messages, params, contexts=contexts)
            )
            (sample,) = completion.samples
            if sample.error is not None:
                raise IntegrityError(sample.error)
            timing = completion.timing
            drafts = llm.engine.parts.drafter is not None
            common.print_json(
                {
                    "model": chosen.model,
                    "plan": llm.plan.to_dict(),
                    "prompt_token_ids": list(completion.prompt_token_ids),
                    "token_ids": list(completion.token_ids),
                    "text": completion.text,
                    "finish_reason": str(sample.finish),
                    "timing": {
                        "queue": timing.queue,
                        "first_token": timing.first_token,
                        "total": timing.total,
                        "unit": "s",
                    },
                    **({"speculation": completion.speculation.to_dict()} if drafts else {}),
                }
            )
            return
        if contexts and llm.mends_answers:  # the words are only right when all of them are there
            print(llm.chat(messages, params, contexts=contexts).text)
            return
        if raw:
            stream = llm.stream(text, params)
        else:
            stream = llm.chat(messages, params, stream=True, contexts=contexts)
        for delta in stream:
            print(delta.text, end="", flush=True)
        print()
