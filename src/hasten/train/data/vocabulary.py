"""A byte-level BPE vocabulary learnt from text (Sennrich et al. 2016; over bytes as in GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hasten.core.errors import SettingError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
_BYTES = 256


def train_vocabulary(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Learn exactly ``size`` entries: `END_OF_TEXT` (first), the 256 bytes, the most frequent merges.

    Every text can be encoded and decodes to itself. The same texts give the same vocabulary. Raises `SettingError`
    when ``size`` cannot hold the bytes, or the texts are too small or too uniform to fill it.
    """
    least = _BYTES + 1
    if size < least:
        raise SettingError(f"vocabulary_size {size} is too small: the bytes and {END_OF_TEXT} take {least}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise SettingError(
            f"the training text gives {tokenizer.get_vocab_size()} vocabulary entries, not {size}; "
            "give more text or a smaller vocabulary_size"
        )
    return tokenizer
