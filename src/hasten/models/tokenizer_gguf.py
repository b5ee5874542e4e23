"""A tokenizer from GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hasten.core.errors import ModelError, ModelFormatError, UnsupportedError
from hasten.models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types of the format

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "smaug-bpe",
    "tekken",
}  # a word in the vocabulary is not merged
_NFC = {"qwen2", "deepseek-r1-qwen"}
_START_BOS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "smaug-bpe",
    "tekken",
}  # raw text starts with BOS unless told not to
_PRE = (*_SPLITS, "smollm", "gpt-2", "default")

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


def tokenizer_from_gguf(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer a GGUF file describes.

    Raises `ModelError` if the file has none, `UnsupportedError` for another kind or pre-tokenizer,
    `ModelFormatError` for a vocabulary that does not hold together.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    kind = fields.get("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise ModelError(
            f"{where}: the file has no tokenizer; convert the model again with its tokenizer files"
        )
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    types = fields.get("tokenizer.ggml.token_type", ())
    if types and len(types) != len(tokens):
        raise ModelFormatError(f"{where}: {len(types)} token types for {len(tokens)} tokens")
    try:
        if kind == "gpt2":
            backend = _byte_level(tokens, fields, pre, where)
        elif kind == "llama":
            backend = _sentencepiece(tokens, fields, where)
        else:
            raise UnsupportedError(f"{where}: tokenizer kind {kind!r} is not supported (gpt2, llama)")
        _add(backend, tokens, types)
    except (ModelError, UnsupportedError):
        raise
    except Exception as error:  # the library raises plain Exception, and TypeError for invalid UTF-8
        raise ModelFormatError(f"{where}: the vocabulary does not hold together: {error}") from error

    def token(key: str) -> int | None:
        found = fields.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None and not 0 <= found < len(tokens):
            raise ModelFormatError(f"{where}: {key} token {found} is beyond the vocabulary of {len(tokens)}")
        return found

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{ours}_token": token(theirs) for ours, theirs in names.items()}
    ends = [token("eos"), token("eot")]
    for text in _END_OF_TURN:
        found = backend.token_to_id(text)
        if found is not None and found < len(types) and types[found] == _CONTROL:
            ends.append(found)
    return Tokenizer(
        backend,
        bos_id=ids["bos_token"],
        eos_ids=[end for end in ends if end is not None],
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _START_BOS)),
        chat_template=fields.get("tokenizer.chat_template"),
        special_tokens={name: tokens[found] for name, found in ids.items() if found is not None},
        where=where,
    )


def _byte_level(tokens: list[str], fields: Mapping[str, Any], pre: str, where: str) -> tokenizers.Tokenizer:
    if pre not in _PRE:
        raise UnsupportedError(f"{where}: pre-tokenizer {pre!r} is not supported ({', '.join(_PRE)})")
    merges = fields.get("tokenizer.ggml.merges")
    if merges is None:
        raise ModelFormatError(f"{where}: a byte-level vocabulary needs 'tokenizer.ggml.merges'")
    # A merge is two tokens joined by a space; neither holds one, in the byte alphabet.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre == "default":
        # What converters meant by an unnamed pre-tokenizer: punctuation, words, then digits by threes.
        steps = [
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ]
        splits = [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
        return pre_tokenizers.Sequence([*splits, plain])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"), plain])


def _sentencepiece(tokens: list[str], fields: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    gemma = fields.get("general.architecture") == "gemma3"
    if gemma:
        # Gemma files write runs of spaces as such, and their order, not their scores, is the merge order.
        tokens = ["\u2581" * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores: tuple[float, ...] = tuple(-float(index) for index in range(len(tokens)))
    else:
        scores = fields.get("tokenizer.ggml.scores", ())
        if len(scores) != len(tokens):
            raise ModelFormatError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens")
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges_from_scores(tokens, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[unknown] if unknown is not None else None,
        )
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def merges_from_scores(tokens: list[str], scores: tuple[float, ...]) -> list[tuple[str, str]]:
    """The merge list that makes BPE join pairs in the order SentencePiece does: best resulting token first."""
    ids = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int]] = []
    for index, token in enumerate(tokens):
        score = -scores[index]
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None:
                right = ids.get(token[cut:])
                if right is not None:
                    found.append((score, left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, left, right in found]


def _add(backend: tokenizers.Tokenizer, tokens: list[str], types: tuple[int, ...]) -> None:
    """Control tokens as special ones, user-defined ones as whole words; both are matched in text before merging."""
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        chosen = [tokens[index] for index, found in enumerate(types) if found == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in chosen])
