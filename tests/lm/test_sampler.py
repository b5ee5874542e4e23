from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hasten.kernels import vocabulary
from hasten.lm.request import SamplingParams
from hasten.lm.sampler import generator_for, non_finite_rows, sample, token_logprobs, truncate


def rows(count: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The distribution by transformers' warpers, in the order temperature, top-k, top-p, min-p."""
    row = TemperatureLogitsWarper(p.temperature)(None, logits[None].clone())
    if p.top_k:
        row = TopKLogitsWarper(min(p.top_k, logits.numel()))(None, row)
    if p.top_p < 1:
        row = TopPLogitsWarper(p.top_p)(None, row)
    if p.min_p:
        row = MinPLogitsWarper(p.min_p)(None, row)
    return row.softmax(-1)[0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.2, 3),
            st.sampled_from([0, 1, 2, 7, 50, 5000]),
            st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.999]),
            st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([5, 300, 1500]),
    st.integers(0, 1000),
    st.sampled_from([0.3, 3.0]),
)
def test_truncation_equals_transformers(settings_list, vocabulary, seed, scale):
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in settings_list]
    logits = rows(len(params), vocabulary, seed, scale)
    mine = logits / torch.tensor([p.temperature for p in params])[:, None]
    truncate(mine, params)
    for i, p in enumerate(params):
        torch.testing.assert_close(mine[i].softmax(-1), reference(logits[i], p), atol=1e-6, rtol=1e-5)


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(2, 100)
    logits[0, [7, 40, 99]] = 5
    logits[1, 3] = -1
    assert sample(logits, [SamplingParams(temperature=0)] * 2, []) == [7, 0]


def test_greedy_and_drawn_rows_mix():
    logits = rows(3, 50)
    params = [SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=0)]
    generators = [generator_for(i) for i in range(3)]
    assert sample(logits, params, generators) == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_the_others():
    logits = rows(6, 200, scale=1)
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k)
        for t, p, k in [(1, 1, 0), (0.7, 0.9, 0), (0, 1, 0), (2, 1, 40), (1, 0.5, 9), (1.3, 1, 0)]
    ]
    together = sample(logits, params, [generator_for(9, i) for i in range(6)])
    alone = [sample(logits[i : i + 1], params[i : i + 1], [generator_for(9, i)])[0] for i in range(6)]
    assert together == alone


def streams(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """A token per row from softmax(logits)."""
    count = len(stream)
    off = (torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.float64))
    return vocabulary.sample(logits, torch.ones(count), *off, torch.full((count,), float("-inf")), stream)


@pytest.mark.parametrize("excluded", [False, True])
def test_drawn_frequencies_match_the_distribution(excluded):
    logits = rows(1, 12, scale=1)
    if excluded:
        logits[0, [0, 5]] = float("-inf")
    probs = logits.softmax(-1)[0]
    count = 40_000
    tokens = draw(logits.expand(count, -1), streams(count))
    observed = torch.bincount(tokens, minlength=12) / count
    sigma = (probs * (1 - probs) / count).sqrt()
    assert ((observed - probs).abs() <= 5 * sigma).all()


def test_consecutive_streams_and_tokens_are_independent():
    """Neighbouring stream numbers (a counter) and neighbouring ids must not move together."""
    tokens = draw(torch.zeros(1, 16).expand(30_000, -1), torch.arange(30_000))
    pairs = torch.bincount(tokens[:-1] * 16 + tokens[1:], minlength=256).double()
    chi2 = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    assert chi2 < 255 + 5 * (2 * 255) ** 0.5


def test_excluding_tokens_that_lose_changes_nothing():
    logits = rows(500, 40, scale=1)
    stream = streams(500)
    free = draw(logits, stream)
    cut = logits.clone()
    keep = torch.zeros_like(cut, dtype=torch.bool).scatter_(1, free[:, None], True) | (rows(500, 40, 9) > 0)
    assert torch.equal(draw(cut.masked_fill(~keep, float("-inf")), stream), free)


def test_rounding_in_the_logits_hardly_ever_shows():
    """Two reduction orders differ by 1e-5; of 50 000 draws over 300 tokens, next to none may notice."""
    logits = rows(500, 300, scale=2)
    noise = rows(500, 300, 5, scale=1e-5)
    differ = sum(
        int((draw(logits, streams(500, s)) != draw(logits + noise, streams(500, s))).sum())
        for s in range(100)
    )
    assert differ <= 3


def test_generators_differ_by_every_part_of_the_seed():
    firsts = {
        float(torch.rand((), generator=generator_for(*seed)))
        for seed in [(0, 0), (0, 1), (1, 0), (1,), (10, 0)]
    }
    assert len(firsts) == 5
    assert torch.rand((), generator=generator_for(3, 4)) == torch.rand((), generator=generator_for(3, 4))


def test_logprobs_equal_torch():
    logits = rows(3, 40)
    found = token_logprobs(logits, [4, 39, 0], 5)
    expected = torch.log_softmax(logits.double(), -1)
    for i, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(expected[i, entry.token]), abs=1e-5)
        best = expected[i].topk(5)
        assert list(entry.top) == best.indices.tolist()
        assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    assert token_logprobs(logits, [1, 2, 3], 0)[0].top == {}


def test_non_finite_rows_are_found():
    logits = rows(5, 30)
    assert non_finite_rows(logits) == []
    logits[1, 3] = float("nan")
    logits[3, 0] = float("inf")
    logits[4, 29] = float("-inf")
    assert non_finite_rows(logits) == [1, 3, 4]
