"""Acceptance of `hydragen` (checks 1, 2, 3 and 6 of its specification).

4 and 5 are speed claims: `python -m benchmarks.hydragen` and `hasten bench hydragen`. The merge operator's laws (2)
are tested by property in tests/kernels/test_merge.py; here they are checked on parts that attention itself made.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.attention.dense import DenseKernel
from hasten.attention.hydragen import Hydragen, HydragenKernel
from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense
from hasten.kernels.attention import PieceWork, attend_pieces, merge
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams

from ..lm.lm_tiny import write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from attention_steps import make_layout, naive_attention, random_pages, random_queries

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=5)
PAGE = 4
ENGINE = {"page_size": PAGE, "max_batch": 16, "max_step_tokens": 64, "threads": 1}
SMALL = Hydragen(min_prefix=PAGE)


@pytest.fixture(scope="module", params=[(4, 2), (4, 4)], ids=["gqa", "mha"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads, kv_heads = request.param
    return write_checkpoint(
        tmp_path_factory.mktemp("hydragen") / "tiny", layers=3, heads=heads, kv_heads=kv_heads, head_size=16
    )


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- 1. equal to the unshared path ----------


def tree_step(levels: int, rows: list[int], seed: int = 0) -> tuple[StepLayout, int]:
    """Eight sequences, not in tree order, under ragged nodes of up to ``levels`` levels."""
    rng = random.Random(seed)
    free = list(range(600))
    rng.shuffle(free)

    def take(count: int) -> list[int]:
        return [free.pop() for _ in range(count)]

    roots = [take(7)]
    middles = [roots[0] + take(n) for n in (3, 5)]
    leaves = [middles[i // 2] + take(n) for i, n in enumerate((2, 6, 1, 4))]
    chosen = [roots, middles, leaves][levels - 1]
    tables, lengths = [], []
    for i in range(8):
        shared = chosen[(3 * i) % len(chosen)]
        own = rng.randint(0, 9) + rows[i]
        lengths.append(len(shared) * PAGE + own)
        tables.append(shared + take(-(-own // PAGE)))
    return make_layout(tables, lengths, rows, PAGE), 600


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("rows", [[1] * 8, [1, 3, 5, 1, 2, 8, 1, 4]], ids=["decode", "nq>1"])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 32), (8, 1, 80)], ids=["gqa", "mha", "mqa"])
def test_attention_equals_the_unshared_path(
    levels: int, rows: list[int], shape: tuple[int, int, int]
) -> None:
    layout, pool = tree_step(levels, rows)
    spec = AttentionSpec(HeadShape(*shape), shape[2] ** -0.5)
    pages = random_pages(levels, pool, PAGE, spec.shape, torch.float32)
    q = random_queries(7, layout.rows, spec.shape)
    dense, shared = DenseKernel(), HydragenKernel(SMALL)
    plan = shared.plan(layout)
    depth = np.zeros(8, np.int64)
    np.add.at(depth, shared.tree(plan.rows, layout.sequence_ids).member_Z, 1)
    assert set(depth) == {levels}
    out = shared.run(plan, 0, q, pages, layout, spec, Dense())
    unshared = dense.run(dense.plan(layout), 0, q, pages, layout, spec, Dense())
    torch.testing.assert_close(out, unshared, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5)


def tree_prompts(seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """A prefix, and prompts under it: two problems with three variants each, and two that share the prefix only."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(3, 300, int(rng.integers(low, high))).tolist()

    prefix = tokens(60, 61)
    prompts = []
    for _ in range(2):
        problem = prefix + tokens(13, 40)
        prompts += [problem + tokens(1, 9) for _ in range(3)]
    prompts += [prefix + tokens(1, 20) for _ in range(2)]
    order = rng.permutation(len(prompts))
    return prefix, [prompts[i] for i in order]


def answers(
    llm: LLM, prefix: list[int], prompts: list[list[int]]
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """(tokens, log-probabilities of the five best at each). The prefix is computed before the prompts come."""
    llm.generate([prefix], SamplingParams(max_tokens=1, temperature=0))
    out = llm.generate(prompts, GREEDY)
    return [(c.token_ids, np.array([sorted(t.top.values()) for t in c.samples[0].logprobs])) for c in out]


def assert_same(got: list, expected: list) -> None:
    for (ids, logprobs), (other_ids, other) in zip(got, expected, strict=True):
        assert ids == other_ids
        assert logprobs.shape == (20, 5)
        np.testing.assert_allclose(logprobs, other, atol=1e-4)


def test_greedy_text_and_logits_equal_the_unshared_path(tiny: Path) -> None:
    prefix, prompts = tree_prompts()
    with LLM(tiny, dtype="float32", **ENGINE) as llm:
        expected = answers(llm, prefix, prompts)
    with LLM(tiny, dtype="float32", prefix_cache=False, **ENGINE) as llm:
        assert_same(answers(llm, prefix, prompts), expected)
    with LLM(tiny, use=[SMALL], dtype="float32", **ENGINE) as llm:
        assert_same(answers(llm, prefix, prompts), expected)
        kernel = llm.engine.runner.kernel
        assert isinstance(kernel, HydragenKernel)
        assert kernel.rebuilt > 0


def test_parallel_samples_share_their_prompt(tiny: Path) -> None:
    """n > 1 without any earlier request: the samples fork the prompt's pages."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=6, ignore_eos=True)
    prompt = tree_prompts()[1][0]
    texts = []
    for use in ([], [SMALL]):
        with LLM(tiny, use=use, dtype="float32", **ENGINE) as llm:
            (done,) = llm.generate([prompt], params)
            texts.append([s.token_ids for s in done.samples])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


# -- 2. merging parts ----------


@pytest.mark.parametrize("cuts", [[64], [16, 48], [1, 63], [0, 64], [8, 8, 8, 40]])
def test_attention_over_parts_merges_to_attention_over_all(cuts: list[int]) -> None:
    """Any cut of the context, an empty part included, in any order."""
    spec = HeadShape(6, 2, 32)
    pages = random_pages(0, 64, 1, spec, torch.float32)
    q = random_queries(1, 5, spec)
    rows = torch.arange(5, dtype=torch.int32)

    def part(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        work = PieceWork(
            torch.arange(begin, end, dtype=torch.int32),
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([0, 5], dtype=torch.int32),
            rows,
            torch.zeros_like(rows),
            torch.full_like(rows, end - begin),
        )
        return attend_pieces(q, pages.k_NGPD, pages.v_NGPD, work, 0.2)

    whole = part(0, 64)
    ends = np.cumsum(cuts).tolist()
    parts = [part(end - size, end) for size, end in zip(cuts, ends, strict=True)]
    for ordered in (parts, parts[::-1]):
        out, lse = torch.cat([o for o, _ in ordered]), torch.cat([x for _, x in ordered])
        start = torch.arange(6, dtype=torch.int32) * len(cuts)
        entry = torch.arange(5 * len(cuts), dtype=torch.int32).view(len(cuts), 5).T.contiguous().view(-1)
        merged = merge(out, lse, start, entry)
        torch.testing.assert_close(merged[0], whole[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(merged[1], whole[1], atol=1e-5, rtol=1e-6)


# -- 3. the prefix is stored, and read, once ----------


def test_prefix_pages_are_stored_and_read_once(tiny: Path) -> None:
    prefix, _ = tree_prompts()
    questions = [[*prefix, 5 + i, 9, 11] for i in range(10)]
    with LLM(tiny, use=[SMALL], dtype="float32", **ENGINE) as llm:
        llm.generate([prefix], SamplingParams(max_tokens=1, temperature=0))
        engine = llm.engine
        requests = [engine.submit(q, GREEDY) for q in questions]
        for _ in range(6):
            engine.step()
        assert all(len(r.sequences[0].token_ids) > len(q) for r, q in zip(requests, questions, strict=True))
        shared = len(prefix) // PAGE
        tables = [r.sequences[0].kv.pages for r in requests]
        assert len({tuple(pages[:shared]) for pages in tables}) == 1
        own = [len(pages) - shared for pages in tables]
        assert len({page for pages in tables for page in pages}) == shared + sum(own)
        assert all(n <= -(-(len(q) + 20) // PAGE) - shared for n, q in zip(own, questions, strict=True))
        # What the step reads: the prefix's pages once, the suffixes' each once.
        kernel = engine.runner.kernel
        ids, plan = kernel._last
        assert len(ids) == 10
        assert len(plan.pieces.page_C) == shared + sum(
            -(-int(n) // PAGE) - shared for n in plan.rows.length_S
        )
        assert len(set(plan.pieces.page_C.tolist())) == len(plan.pieces.page_C)
        engine.run()
        assert engine.cache.pool.used == llm.facts()["pages_stored"]


# -- 6. requests join and leave ----------


def test_requests_join_and_leave(tiny: Path) -> None:
    """Arrivals, departures, cancellations and another group between: every finished text is what it is alone."""
    prefix, prompts = tree_prompts(1)
    other, more = tree_prompts(2)
    given = [p for pair in zip(prompts, more, strict=True) for p in pair]
    rng = random.Random(0)
    params = [SamplingParams(max_tokens=rng.randint(3, 25), temperature=0, ignore_eos=True) for _ in given]
    with LLM(tiny, dtype="float32", **ENGINE) as llm:
        expected = [llm.generate([p], s)[0].token_ids for p, s in zip(given, params, strict=True)]
    # Few pages: some requests are preempted and computed again.
    engine_settings = {**ENGINE, "max_batch": 8, "kv_tokens": 640}
    with LLM(tiny, use=[SMALL], dtype="float32", **engine_settings) as llm:
        engine = llm.engine
        llm.generate([prefix, other], SamplingParams(max_tokens=1, temperature=0))
        waiting, running = list(range(len(given))), {}
        sizes: set[int] = set()
        while waiting or engine.busy:
            if waiting and rng.random() < 0.5:
                i = waiting.pop(0)
                running[i] = engine.submit(given[i], params[i])
            if rng.random() < 0.1:
                engine.cancel(engine.submit([*prefix, 7, 8, 9, 10], GREEDY))
            if engine.busy:
                engine.step()
                if engine.runner.kernel._last is not None:
                    sizes.add(len(engine.runner.kernel._last[0]))
        assert len(sizes) > 3
        assert [running[i].completion().token_ids for i in range(len(given))] == expected
        assert engine.runner.kernel.rebuilt > 3
        assert engine.cache.pool.used == llm.facts()["pages_stored"]


def test_replanning_costs_nothing_while_the_group_lives(tiny: Path) -> None:
    prefix, _ = tree_prompts()
    with LLM(tiny, use=[SMALL], dtype="float32", **ENGINE) as llm:
        llm.generate([prefix], SamplingParams(max_tokens=1, temperature=0))
        for i in range(8):
            llm.engine.submit([*prefix, 5 + i], GREEDY)
        llm.engine.run()
        assert llm.engine.runner.kernel.rebuilt <= 2


# -- on the real model ----------


def test_real_model_answers_alike(default_model_path: Path) -> None:
    """SmolLM2 in float32: six questions under one document."""
    document = "The river has three sources. The first lies in the north, the second in the hills. " * 12
    questions = [
        document + f"\nQuestion {i}: {q}\nAnswer:"
        for i, q in enumerate(
            ["Where is the first source?", "How many sources are there?", "Name the hills."]
        )
        for _ in range(2)
    ]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    texts = []
    for use in ([], [Hydragen()]):
        with LLM(default_model_path, use=use, dtype="float32", max_batch=8, kv_tokens=4096, threads=1) as llm:
            llm.generate([document], SamplingParams(max_tokens=1, temperature=0))
            texts.append([c.token_ids for c in llm.generate(questions, params)])
    assert texts[0] == texts[1]
