"""The byte-level BPE vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import SettingError
from hasten.train.data.vocabulary import END_OF_TEXT, END_OF_TEXT_ID, train_vocabulary

TEXTS = ["the quick brown fox jumps over the lazy dog, the dog sleeps", "naïve façade — 你好 你好"] * 3


def test_learns_frequent_words_and_has_the_size_asked_for() -> None:
    vocabulary = train_vocabulary(TEXTS, 300)
    assert vocabulary.get_vocab_size() == 300
    assert vocabulary.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID == 0
    assert len(vocabulary.encode(" the").ids) == 1
    assert vocabulary.encode(f"a{END_OF_TEXT}b").ids.count(0) == 1


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    vocabulary = test_any_text_comes_back.vocabulary  # type: ignore[attr-defined]
    assert vocabulary.decode(vocabulary.encode(text).ids, skip_special_tokens=False) == text


test_any_text_comes_back.vocabulary = train_vocabulary(TEXTS, 290)  # type: ignore[attr-defined]


def test_the_same_texts_give_the_same_vocabulary() -> None:
    assert train_vocabulary(TEXTS, 310).to_str() == train_vocabulary(iter(TEXTS), 310).to_str()


@pytest.mark.parametrize(
    ("texts", "size", "match"),
    [
        (TEXTS, 256, "256 is too small.* take 257"),
        ([], 300, "gives 257 vocabulary entries, not 300"),
        (["a"], 300, "give more text or a smaller vocabulary_size"),
    ],
)
def test_refuses_what_it_cannot_fill(texts: list[str], size: int, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        train_vocabulary(texts, size)
