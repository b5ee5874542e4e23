"""Chat templates: Jinja in a sandbox, with the names that published templates expect to find."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hasten.core.errors import ModelError, RequestError


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the answer in training templates; the text is kept as is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRefusalError(Exception):
    """What a template raises through ``raise_exception``."""


def _refuse(message: str) -> None:
    raise _TemplateRefusalError(message)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


class ChatTemplate:
    """One compiled template. ``special_tokens``: bos_token, eos_token, ... as the template may name them.

    Raises `ModelError` if the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.where = where
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{where}: the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text. Raises `RequestError` naming the message at fault."""
        conversation = [_checked(index, message) for index, message in enumerate(messages)]
        if not conversation:
            raise RequestError("a chat needs at least one message")
        try:
            return self._template.render(
                messages=conversation,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _TemplateRefusalError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program from the file: whatever it raises is its refusal
            raise RequestError(
                f"{self.where}: the chat template fails on {_roles(conversation)}: {type(error).__name__}: {error}"
            ) from error


def _roles(conversation: list[dict[str, Any]]) -> str:
    return "messages with roles " + ", ".join(message["role"] for message in conversation)


def _checked(index: int, message: Any) -> dict[str, Any]:
    """A message with string content (text parts joined). Raises `RequestError` naming it by number."""
    what = f"message {index + 1}"
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{what}: expected an object with 'role' and 'content', got {type(message).__name__}"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{what}: 'role' must be a non-empty string, got {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise RequestError(f"{what} (role {role!r}): only text parts are supported, got {part!r:.80}")
            parts.append(part["text"])
        content = "".join(parts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RequestError(f"{what} (role {role!r}): 'content' must be text, got {content!r:.80}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} (role {role!r}): 'content' is not valid Unicode: {error}") from error
    return {**message, "role": role, "content": content}
