"""Acceptance of `quantspec`: the checks of its specification that are not about speed (that is
`benchmarks/quantspec.py`).

1 greedy answers are those of the 8-bit cache; 2 the quantiser's error bounds on the model's own keys and values; 3
the 8-bit cache costs next to no perplexity, most guesses are kept; 4 the buffers as a state machine (with appends,
rejections, forks and prefixes: `tests/lm/test_quantspec.py`); 5 the bytes shrink; 6 sampling keeps the distribution.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hasten.core.corpus import Corpus
from hasten.core.plan import Plan
from hasten.kernels.reference import quantspec as reference
from hasten.lm.decoding.quantspec import QuantSpec
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.workloads.language import perplexity

from ..lm.lm_tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, TOKENS = 400, 40


def opened(path: Path, *use: QuantSpec, dtype: str = "bfloat16", **engine: object) -> LLM:
    return LLM(Plan(str(path), use, dtype, {"max_batch": 4, "kv_tokens": 2048} | engine))


@pytest.fixture(scope="module")
def drafted(default_model_path: Path) -> LLM:
    """Set-up (i): bfloat16 weights, drafted by the checkpoint's own 4-bit codes."""
    return opened(default_model_path, QuantSpec())


@pytest.fixture(scope="module")
def alone(default_model_path: Path) -> LLM:
    """Baseline B: the same 8-bit cache, no guesses."""
    return opened(default_model_path, QuantSpec(draft=False))


@pytest.fixture(scope="module")
def texts(drafted: LLM, documentation: Corpus) -> list[list[int]]:
    """Held-out documents, long enough for two quantised pages."""
    found = []
    for document in documentation.documents("test"):
        ids = drafted.tokenizer.encode(document.text[:8000])
        if len(ids) >= 640:
            found.append(ids)
        if len(found) == 3:
            return found
    raise AssertionError("the corpus has no three long documents")


# 1 and 3 --------------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_8_bit_cache(
    drafted: LLM, alone: LLM, texts: list[list[int]]
) -> None:
    """Both prompts together, drafted; each alone, not drafted. Guesses cross the end of a page (tokens 384, 512)."""
    prompts = [texts[0][:PROMPT], texts[1][: 512 - TOKENS // 2]]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    before = drafted.engine.speculation
    found = [c.token_ids for c in drafted.generate(prompts, params)]
    assert found == [alone.generate([p], params)[0].token_ids for p in prompts]
    done = drafted.engine.speculation
    drafted_tokens, accepted = done.drafted - before.drafted, done.accepted - before.accepted
    print(f"kept {accepted} of {drafted_tokens} guesses")
    assert accepted >= 0.85 * drafted_tokens > 0


def test_most_guesses_are_kept_at_temperature_1(drafted: LLM, texts: list[list[int]]) -> None:
    """At least 0.93 of what is proposed, which is less than the chance of a guess: those after a rejection count
    too.
    """
    params = SamplingParams(max_tokens=48, temperature=1.0, ignore_eos=True, seed=1, n=2)
    before = drafted.engine.speculation
    drafted.generate([texts[2][:PROMPT]], params)
    done = drafted.engine.speculation
    drafted_tokens, accepted = done.drafted - before.drafted, done.accepted - before.accepted
    print(f"kept {accepted} of {drafted_tokens} guesses")
    assert accepted >= 0.93 * drafted_tokens > 0


def test_the_8_bit_cache_costs_next_to_no_perplexity(
    default_model_path: Path, alone: LLM, texts: list[list[int]]
) -> None:
    full = opened(default_model_path)
    windows = [ids[:640] for ids in texts[:2]]
    exact, mine = (perplexity(llm.score(windows, context=320)) for llm in (full, alone))
    print(f"perplexity {exact:.4f} with a bfloat16 cache, {mine:.4f} with 8 bits")
    assert math.isclose(exact, mine, rel_tol=5e-3)


# 2 and 5 --------------------------------------------------------------------------------------------------------------


def test_bounds_and_bytes_on_the_models_own_cache(
    default_model_path: Path, alone: LLM, texts: list[list[int]]
) -> None:
    ids = texts[0][:400]
    plain = opened(default_model_path, page_size=128)
    for llm in (plain, alone):
        llm.engine.cache.store.clear()
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    requests = [llm.engine.submit(ids, params) for llm in (plain, alone)]
    for llm in (plain, alone):
        llm.engine.step()
    mine, theirs = (r.sequences[0].kv for r in requests[::-1])
    assert mine is not None and theirs is not None  # noqa: PT018
    format, pages = alone.engine.cache.format, plain.engine.cache.format.pages(0)
    page, other = torch.tensor(mine.pages[:1]), theirs.pages[0]
    # The first layer's keys and values do not depend on attention: both caches were given the same.
    planes = format.planes[0]
    for x, eight, four, step, dim in zip(
        (pages.k_NGPD[other], pages.v_NGPD[other]),
        reference.unpack(planes, page, True),
        reference.unpack(planes, page, False),
        (planes.k_scale[page].float()[:, :, None], planes.v_scale[page].float()[..., None]),
        (-2, -1),
        strict=True,
    ):
        x = x.float()[None]
        upper, _, s, z = reference.quantise(x, dim)
        clipped = (x - (upper * s + z)) / (s / 16) > 7.5
        slack = 1e-5 * float(x.abs().max())
        print(f"L clips {float(clipped.float().mean()):.3f} of the numbers")
        assert ((x - eight).abs() <= torch.where(clipped, step / 16, step / 32) + slack).all()
        assert ((x - four).abs() <= step / 2 + slack).all()
        assert clipped.float().mean() < 0.06
    shape, layers = alone.engine.cache.shape, alone.engine.cache.layers
    bfloat16 = 2 * 2 * layers * 128 * shape.kv_heads * shape.size
    numbers = layers * shape.kv_heads * 4 * (128 + shape.size)
    assert alone.engine.cache.page_bytes == bfloat16 / 2 + numbers
    assert format.draft_bytes(layers, 128, shape) == bfloat16 / 4 + numbers
    assert sum(p.bytes() for p in format.planes) == alone.engine.cache.bytes()
    assert plain.engine.cache.page_bytes == bfloat16
    for llm in (plain, alone):
        llm.engine.cancel_all()


# 6 --------------------------------------------------------------------------------------------------------------------


def test_sampling_keeps_the_distribution(tmp_path: Path) -> None:
    """Pairs of tokens of many seeded requests, with and without guesses: same frequencies (chi-square)."""
    path = write_checkpoint(tmp_path / "tiny")
    settings = {"group": 4, "draft_tokens": 2, "draft_weights": "rtn", "weight_group": 32}
    engine = {"page_size": 4, "max_batch": 64, "max_step_tokens": 600}
    prompt = torch.randint(3, 320, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    count, pairs = 600, []
    for draft, base in ((False, 0), (True, 10_000)):
        llm = opened(path, QuantSpec(**settings, draft=draft), dtype="float32", **engine)
        requests = [
            llm.engine.submit(
                prompt,
                SamplingParams(max_tokens=4, temperature=1.0, top_k=4, ignore_eos=True, seed=base + i),
            )
            for i in range(count)
        ]
        llm.engine.run()
        pairs.append([r.completion().token_ids[1:3] for r in requests])
    done = llm.engine.speculation
    assert count / 2 < done.drafted
    assert 0 < done.accepted < done.drafted  # rejections and the residual are at work
    chi2 = degrees = 0
    for pair in sorted(set(pairs[0]) | set(pairs[1])):
        x, y = pairs[0].count(pair), pairs[1].count(pair)
        if x + y >= 20:
            chi2, degrees = chi2 + (x - y) ** 2 / (x + y), degrees + 1
    assert degrees >= 4
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5
