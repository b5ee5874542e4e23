"""OpenAI's request and response bodies for chat and text completions, as pydantic models.

Used by `hasten batch` (and the HTTP API). Fields hasten cannot honour are refused, not ignored: a silently dropped
``response_format`` would be a wrong answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hasten.core.errors import RequestError
from hasten.lm.request import Completion, Sample, SamplingParams

DEFAULT_MAX_TOKENS = 256


class Message(BaseModel):
    """One chat message; ``content`` is text or a list of text parts."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: text content only."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RequestError(
                        f"message part of type {part.get('type')!r}: only text parts are supported"
                    )
            content = "".join(part["text"] for part in content)
        return {**self.model_dump(exclude={"content"}), "content": content or ""}


class _Body(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = 1
    stream: Literal[False] | None = None
    user: str | None = None
    ignore_eos: bool = False

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return SamplingParams(
            max_tokens=given(max_tokens, DEFAULT_MAX_TOKENS),
            temperature=given(self.temperature, 1.0),
            top_k=given(self.top_k, 0),
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=stop,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            n=given(self.n, 1),
        )


class ChatBody(_Body):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def params(self) -> SamplingParams:
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(given, (self.top_logprobs or 0) if self.logprobs else None)


class TextBody(_Body):
    """Body of ``POST /v1/completions``; ``prompt`` is one text or one list of token ids."""

    prompt: str | list[int]
    logprobs: int | None = None

    def params(self) -> SamplingParams:
        return self.sampling(self.max_tokens, self.logprobs)


def parse_body(url: str, body: Any) -> ChatBody | TextBody:
    """Validate the body of a request to ``url``; raise `RequestError` naming the field otherwise."""
    kinds: dict[str, type[ChatBody] | type[TextBody]] = {
        "/v1/chat/completions": ChatBody,
        "/v1/completions": TextBody,
    }
    if url not in kinds:
        raise RequestError(f"url {url!r}: use one of {', '.join(kinds)}")
    if not isinstance(body, Mapping):
        raise RequestError("body must be a JSON object")
    try:
        return kinds[url].model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"body.{where}: {first['msg']}") from None


def _usage(completion: Completion) -> dict[str, Any]:
    produced = sum(len(s.token_ids) for s in completion.samples)
    prompt = len(completion.prompt_token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": produced,
        "total_tokens": prompt + produced,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
    }


def _choice(index: int, sample: Sample, chat: bool, decode: Any) -> dict[str, Any]:
    logprobs: dict[str, Any] | None = None
    if sample.logprobs:
        logprobs = {
            "content": [
                {
                    "token": decode(item.token),
                    "logprob": item.logprob,
                    "top_logprobs": [{"token": decode(t), "logprob": p} for t, p in item.top.items()],
                }
                for item in sample.logprobs
            ]
        }
    out: dict[str, Any] = {"index": index, "finish_reason": str(sample.finish), "logprobs": logprobs}
    if chat:
        out["message"] = {"role": "assistant", "content": sample.text}
    else:
        out["text"] = sample.text
    return out


def response_body(completion: Completion, model: str, *, chat: bool, decode: Any) -> dict[str, Any]:
    """OpenAI's response object. ``decode`` maps one token id to its text (for logprobs)."""
    return {
        "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(i, s, chat, decode) for i, s in enumerate(completion.samples)],
        "usage": _usage(completion),
    }
