"""Passkey prompts: a key between two lines of real text, asked for at the end, the same everywhere."""

from __future__ import annotations

import re

import pytest

from hasten.core.errors import RequestError
from hasten.models.checkpoint import open_checkpoint
from hasten.workloads.passkey import DEPTHS, Passkey, passkeys


@pytest.fixture(scope="module")
def tokenizer(default_model_path, documentation):
    return open_checkpoint(default_model_path).tokenizer()


def test_prompts_hold_their_key_where_they_say(tokenizer):
    found = passkeys(tokenizer, 600, texts=2)
    assert [p.depth for p in found] == [*DEPTHS, *DEPTHS]
    assert len({p.key for p in found}) == len(found)
    assert len({p.document for p in found}) == 2
    for p in found:
        text = tokenizer.decode(p.token_ids, skip_special=False)
        assert 500 < len(p.token_ids) <= 600
        assert text.count(p.key) == 2
        assert f"\n\nThe pass key is {p.key}. Remember it. {p.key} is the pass key.\n\n" in text
        assert text.endswith("\nThe pass key is")
        assert text.count("<|im_start|>user") == 1  # the model's own template
        assert abs(text.index(p.key) / len(text) - p.depth) < 0.25


def test_same_arguments_same_prompts(tokenizer):
    assert passkeys(tokenizer, 300, 1, (0.5,)) == passkeys(tokenizer, 300, 1, (0.5,))
    (first,), (other,) = (passkeys(tokenizer, 300, 1, (0.5,), seed=seed) for seed in (0, 1))
    assert first.key != other.key
    assert first.document == other.document


def test_prompts_of_a_text_share_what_precedes_the_key(tokenizer):
    late, early = passkeys(tokenizer, 600, 1, (0.9, 0.5))
    shared = next(i for i, (a, b) in enumerate(zip(late.token_ids, early.token_ids, strict=False)) if a != b)
    assert shared > 200


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_key_at_either_end(tokenizer, depth):
    (p,) = passkeys(tokenizer, 300, 1, (depth,))
    text = tokenizer.decode(p.token_ids)
    filler = text.replace(p.key, "")
    assert (len(re.split(p.key, text)[0]) < 250) == (depth == 0.0)
    assert len(filler) > 500


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345.", True),
        ("12345", True),
        (" 123456.", False),
        (" 1234.", False),
        ("", False),
        ("54321 12345", False),
    ],
)
def test_answer_is_right_only_digit_for_digit(answer, right):
    assert Passkey((), "12345", 0.5, "x").found_in(answer) is right


def test_bad_arguments_are_refused(tokenizer):
    with pytest.raises(RequestError, match="at least 128 tokens, not 20"):
        passkeys(tokenizer, 20)
    with pytest.raises(RequestError, match=r"depth 1\.5"):
        passkeys(tokenizer, 300, 1, (0.5, 1.5))
    with pytest.raises(RequestError, match="at least one text"):
        passkeys(tokenizer, 300, 0)
    with pytest.raises(RequestError, match="one depth"):
        passkeys(tokenizer, 300, 1, ())
