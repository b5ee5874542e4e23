"""`hasten show`: the card of one system."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from hasten.cli import common


def show(
    slug: Annotated[str, typer.Argument(help="A system of `hasten list`.")],
    as_json: common.AsJson = False,
) -> None:
    """Show one system: source, claim, slots, settings, how to use it, and what was measured.

    Piped, it prints the card as Markdown.

    Examples:

      hasten show adamas

      hasten show gptq --json
    """
    from hasten.catalog import cards, loader

    record = loader.record(slug)
    checkout = cards.source_checkout()
    if as_json:
        published = cards.published_of(record, checkout)
        common.print_json(
            {
                **record.to_dict(),
                "settings": cards.settings(record.load()) if record.built else [],
                "published": asdict(published) if published else None,
            }
        )
        return
    text = cards.card(record, checkout)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        print(text, end="")
