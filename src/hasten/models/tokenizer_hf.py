"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from hasten.core.errors import ModelError, ModelFormatError
from hasten.models.tokenizer import Tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_from_folder(path: Path, eos_ids: tuple[int, ...] = (), bos_id: int | None = None) -> Tokenizer:
    """Read ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    ``eos_ids`` and ``bos_id``: what the model's own configuration says; the tokenizer's end token is added.
    Raises `ModelError` if there is no ``tokenizer.json``, `ModelFormatError` if a file is malformed.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        hint = " (a tokenizer.model alone is not enough)" if (path / "tokenizer.model").exists() else ""
        raise ModelError(f"{path}: no tokenizer.json{hint}; fetch it from the model's repository")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelFormatError(f"{file}: not a tokenizer: {error}") from error
    settings = _json(path / "tokenizer_config.json")
    special = {
        name: text for name in _SPECIAL if (text := _token_text(settings.get(name))) is not None
    } or _from_map(path)
    if "bos_token" in special:
        bos_id = backend.token_to_id(special["bos_token"])
    if "eos_token" in special and (eos := backend.token_to_id(special["eos_token"])) is not None:
        eos_ids = (*eos_ids, eos)
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bos_id is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bool(adds_bos),
        chat_template=_chat_template(path, settings),
        special_tokens=special,
        where=str(path),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _token_text(value: Any) -> str | None:
    """A special token is written as text or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _from_map(path: Path) -> dict[str, str]:
    """Older folders keep the special tokens in a file of their own."""
    data = _json(path / "special_tokens_map.json")
    return {name: text for name in _SPECIAL if (text := _token_text(data.get(name))) is not None}


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    """A file of its own comes before the one in the settings; of several named ones the default is taken."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _json(path / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise ModelFormatError(f"{path}: the chat template is not text")
    return template
