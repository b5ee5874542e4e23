"""Text to token ids and back, with the chat template; the same class whatever file the vocabulary came from.

Encoding is the `tokenizers` library's. Decoding goes through each token's bytes and one incremental UTF-8 decoder,
so that a stream costs the same per token however long it is, never shows half a character, and adds up to exactly
what `Tokenizer.decode` returns.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from hasten.core.errors import ModelError, RequestError
from hasten.models.chat import ChatTemplate

_SPACE = "\u2581"  # how SentencePiece vocabularies write a space


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE vocabularies: printable bytes stand for themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = byte_alphabet()


class Tokenizer:
    """A model's tokenizer. Immutable after construction and safe to share between threads.

    bos_id: start-of-text id or None. adds_bos: whether the model's raw text starts with it. eos_ids: ids that end
    an answer. vocab_size: highest id plus one. chat_template: the Jinja source, or None. special_ids: ids that
    `decode` leaves out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        adds_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        where: str = "tokenizer",
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.where = where
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.adds_bos = adds_bos and bos_id is not None
        self.chat_template = chat_template
        self._chat: ChatTemplate | None = None
        self._special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self._byte_level, self._strips_space = _decoder_kind(backend, where)
        self._bytes: dict[int, bytes] = {i: token.content.encode("utf-8") for i, token in added.items()}

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised. ``add_bos`` puts `bos_id` in front.

        Raises `RequestError` if the text holds lone surrogates (it came from invalid UTF-8).
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            if not isinstance(text, str):
                raise RequestError(f"text must be a string, not {type(text).__name__}") from error
            raise RequestError(f"the text is not valid Unicode: {error}") from error
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continuing: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. See `stream` for ``continuing``."""
        stream = self.stream(skip_special, continuing)
        return stream.feed_all(ids) + stream.finish()

    def stream(self, skip_special: bool = True, continuing: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one.

        ``continuing``: the ids follow other text, so the space that some vocabularies put before the first word of
        a text is kept.
        """
        return StreamDecoder(self, skip_special, self._strips_space and not continuing)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for (possibly part of a character). Empty for ids without a token."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        token = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            value = b""  # padding rows of the embedding
        elif self._byte_level:
            codes = [_ALPHABET.get(character, -1) for character in token]
            value = token.encode("utf-8") if -1 in codes else bytes(codes)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            value = bytes.fromhex(token[3:5])
        else:
            value = token.replace(_SPACE, " ").encode("utf-8")
        self._bytes[token_id] = value
        return value

    def token_id(self, token: str) -> int | None:
        """The id of a token given literally, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation by the model's own template.

        Raises `RequestError` naming the message that is malformed or that the template refuses, `ModelError` if the
        model has no template.
        """
        if self.chat_template is None:
            raise ModelError(f"{self.where}: no chat template; pass plain text instead (--raw)")
        if self._chat is None:
            self._chat = ChatTemplate(self.chat_template, self._special_tokens, self.where)
        return self._chat.render(messages, add_generation_prompt, tools)


class StreamDecoder:
    """Feeds ids, gets text: each call returns what became certain. Not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, strip_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Text newly completed by ``token_id``; empty while a character is incomplete."""
        if token_id in self._skip:
            return ""
        return self._out(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def feed_all(self, ids: Iterable[int]) -> str:
        """`feed` over several ids at once."""
        token_bytes, skip = self._tokenizer.token_bytes, self._skip
        return self._out(self._utf8.decode(b"".join(token_bytes(i) for i in ids if i not in skip)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut."""
        return self._out(self._utf8.decode(b"", final=True))

    def _out(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _decoder_kind(backend: tokenizers.Tokenizer, where: str) -> tuple[bool, bool]:
    """(byte-level, strips the first space) from the library's decoder. Raises `ModelError` for any other kind."""
    state: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if "Metaspace" in kinds:
        step = steps[kinds.index("Metaspace")]
        if step.get("replacement", _SPACE) == _SPACE:
            return False, step.get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds and "Replace" in kinds:
        replace = steps[kinds.index("Replace")]
        if replace.get("pattern") == {"String": _SPACE} and replace.get("content") == " ":
            return False, any(step["type"] == "Strip" and step.get("start") for step in steps)
    raise ModelError(
        f"{where}: unsupported tokenizer decoder {kinds} (byte-level or SentencePiece BPE expected)"
    )
