from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from hasten.core.errors import RequestError
from hasten.lm.processors import LogitProcessor, needs_processor
from hasten.lm.request import SamplingParams

VOCABULARY = 60


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(max_examples=60, deadline=None)
@given(tokens, tokens, tokens, st.floats(0.5, 2), st.integers(0, 99))
def test_repetition_and_bias_equal_transformers(prompt, output, ahead, penalty, seed):
    prompt = prompt or [1]
    params = SamplingParams(repetition_penalty=penalty, logit_bias={3: 2.5, 9: -1.0})
    processor = LogitProcessor(params, VOCABULARY, prompt)
    for token in output:
        processor.commit(token)
    mine = logits(seed)
    processor.apply(mine, ahead)
    ids = torch.tensor([prompt + output + ahead])
    theirs = SequenceBiasLogitsProcessor([[[3], 2.5], [[9], -1.0]])(ids, logits(seed)[None])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
    torch.testing.assert_close(mine, theirs[0])


@settings(max_examples=60, deadline=None)
@given(tokens, tokens, tokens, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_presence_and_frequency_count_the_output_only(prompt, output, ahead, presence, frequency, seed):
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    processor = LogitProcessor(params, VOCABULARY, prompt)
    for token in output:
        processor.commit(token)
    mine, expected = logits(seed), logits(seed)
    processor.apply(mine, ahead)
    for token in range(VOCABULARY):
        count = (output + ahead).count(token)
        expected[token] -= count * frequency + (count > 0) * presence
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_guessed_tokens_leave_no_trace():
    processor = LogitProcessor(SamplingParams(frequency_penalty=1.0, repetition_penalty=1.5), VOCABULARY, [1])
    processor.apply(logits(0), [5, 5, 6])
    after = logits(0)
    processor.apply(after)
    fresh = logits(0)
    LogitProcessor(SamplingParams(frequency_penalty=1.0, repetition_penalty=1.5), VOCABULARY, [1]).apply(
        fresh
    )
    assert torch.equal(after, fresh)


def test_only_who_asks_gets_a_processor():
    assert not needs_processor(SamplingParams(temperature=0.3, top_p=0.5))
    for changed in ({"logit_bias": {1: 1.0}}, {"repetition_penalty": 1.1}, {"presence_penalty": -1.0}):
        assert needs_processor(SamplingParams(**changed))
    with pytest.raises(RequestError, match="token 60 is not in the vocabulary"):
        LogitProcessor(SamplingParams(logit_bias={60: 1.0}), VOCABULARY, [])
