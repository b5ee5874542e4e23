"""Acceptance of `ragcache` (checks 1-3 and 5 of its specification, the starvation bound of 4 and the exactness of 6;
times and the hit rates of real questions are `benchmarks/ragcache.py`)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.attention.adamas import Adamas
from hasten.lm.context.retrieval import Candidates, Documents, RetrievalPipeline, StagedSearch
from hasten.lm.context.transform import Prompt
from hasten.lm.kvcache.prefill_cost import PrefillCost
from hasten.lm.kvcache.ragcache import KnowledgeStore, RagCache
from hasten.lm.llm import LLM
from hasten.lm.request import FinishReason, SamplingParams
from hasten.workloads.retrieval_trace import replay, trace

from ..lm.lm_tiny import write_checkpoint
from ..lm.ragcache_world import SIZE, check, context, documents, prompt, store

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
ENGINE = {"page_size": SIZE, "dtype": "float32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("ragcache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(root / "home"))
        yield write_checkpoint(root / "tiny")


def load(tiny: Path, use: list[object], **engine: object) -> LLM:
    return LLM(tiny, use=use, **{**ENGINE, **engine})


def stored(llm: LLM) -> KnowledgeStore:
    found = llm.engine.cache.store
    assert isinstance(found, KnowledgeStore)
    return found


def requests(count: int, known: list[list[int]], seed: int = 0) -> list[Prompt]:
    """Two documents each, the popular ones often, with a question of its own; every tenth names no documents."""
    rng, head = np.random.default_rng(seed), documents(1, 6, 7, 99)[0]
    out = []
    for i, asked in enumerate(trace(count, len(known), 0, seed)):
        other = (asked.page + 1 + asked.question % 3) % len(known)
        made = prompt(
            head, known[asked.page], known[other], question=rng.integers(3, 300, rng.integers(1, 9)).tolist()
        )
        out.append(made.replace(segments=()) if i % 10 == 9 else made)
    return out


# -- 1. the same tokens, whatever was evicted and loaded back ----------


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "file"])
def test_two_hundred_answers_are_those_without_a_cache(tiny, tmp_path, folder):
    asked = requests(200, documents(16))
    with load(tiny, [], prefix_cache=False) as llm:
        want = [c.token_ids for c in llm.generate(asked, GREEDY)]
    where = str(tmp_path) if folder else None
    use = [RagCache(host_mb=0.5, host_folder=where)]
    with load(tiny, use, kv_tokens=400, max_batch=3, max_step_tokens=48) as llm:
        got, cached = [], 0
        for start in range(0, 200, 20):
            done = llm.generate(asked[start : start + 20], GREEDY)
            got += [c.token_ids for c in done]
            cached += sum(c.cached_tokens for c in done)
            check(stored(llm), llm.engine.cache.pool)
        store = stored(llm)
        assert got == want
        assert store.swapped > 0
        assert store.loaded > 0
        assert cached > 0.2 * sum(len(p.token_ids) for p in asked)
        assert llm.engine.cache.pool.used == len(store)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_what_comes_back_is_the_same_bit_for_bit(tiny, kv_dtype):
    """Pages, and what an attention policy keeps beside them."""
    beside = [] if kv_dtype == "int8" else [Adamas(fixed_cut=0.5, dense_layers=0)]
    asked = prompt(*documents(3, 30, 50), question=[5, 6])
    with load(tiny, [RagCache(), *beside], kv_dtype=kv_dtype, kv_tokens=400) as llm:
        llm.generate([asked], GREEDY)
        store, ids = stored(llm), asked.token_ids
        before = [[x.clone() for x in store._content(page)] for page in store.match(ids, asked.segments)]
        assert len(before) == asked.segments[-1] // SIZE
        assert store.evict(10_000) == len(before)
        assert len(store) == 0
        for page in range(llm.engine.cache.pool.count):  # nothing of it is left in the pool
            store.format.write_page(page, [torch.zeros_like(x) for x in store.format.read_page(page)])
        after = [store._content(page) for page in store.match(ids, asked.segments)]
        assert store.loaded == len(before)
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


# -- 2. invariants under random load ----------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["pgdsf", "lru"])
def test_the_tree_stays_whole_under_random_load(tiny, tmp_path, seed, policy):
    made, pool = store(
        context(tiny, tmp_path), 60, policy=policy, host_pages=(0, 20, 90)[seed % 3], frequency_window=40
    )
    rng, known = random.Random(seed), documents(9, 3, 40, seed)
    running: list[list[int]] = []
    for _ in range(250):
        chosen = prompt(*rng.sample(known, rng.randint(1, 3)), question=[1] * rng.randint(1, 9))
        ids, ends = chosen.token_ids, chosen.segments if rng.random() < 0.8 else ()
        pages = made.match(ids[:-1], ends)
        pool.retain(pages)
        made.accessed(ids, ends, len(pages) * SIZE)
        need = len(ids) // SIZE - len(pages)
        in_use = {page: pool.refs[page] for held in (*running, pages) for page in held}
        if need > pool.free:
            made.evict(need - pool.free)
        assert all(pool.refs[page] == refs for page, refs in in_use.items()), "a page in use was touched"
        if need <= pool.free:
            pages = [*pages, *(pool.allocate() for _ in range(need))]
            made.insert(ids[: rng.randint(0, len(ids))], pages, ends)
        running.append(pages)
        if len(running) > 2:
            pool.release(running.pop(rng.randrange(3)))
        check(made, pool)
    for pages in running:
        pool.release(pages)
    assert pool.used == len(made)
    made.clear()
    check(made, pool)
    assert made.empty
    assert pool.used == 0


# -- 3. what is kept, and in which order requests run ----------


@pytest.fixture(scope="module")
def hit_rates(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Of every policy at three capacities, on one trace: 3% of the documents get 60% of the requests."""
    given, known = context(tiny, tmp_path_factory.mktemp("hits")), documents(150, 8, 60, 3)
    asked = [(p.token_ids, p.segments) for p in requests(800, known, 1) if p.segments]
    out: list[dict[str, float]] = []
    for host_pages in (0, 150, 300):
        out.append({})
        for policy in ("pgdsf", "gdsf", "lru", "lfu"):
            made, pool = store(given, 60, policy=policy, host_pages=host_pages, history=policy == "pgdsf")
            out[-1][policy] = replay(made, pool, asked, instructions=1).hit_rate
            check(made, pool)
    return out


@pytest.mark.parametrize("other", ["gdsf", "lru"])
def test_it_hits_at_least_as_often_on_a_skewed_trace(hit_rates, other):
    for rate in hit_rates:
        assert rate["pgdsf"] >= rate[other] > 0.1, rate


@pytest.mark.xfail(
    strict=True, reason="popularity that never changes is what LFU is made for: 1 to 2 points above"
)
def test_it_hits_at_least_as_often_as_lfu_on_a_skewed_trace(hit_rates):
    for rate in hit_rates:
        assert rate["pgdsf"] >= rate["lfu"], rate


def test_it_hits_more_often_than_lfu_where_popularity_moves(tiny, tmp_path):
    """Other documents become popular every 200 requests."""
    given, known = context(tiny, tmp_path), documents(150, 8, 60, 3)
    asked = [(p.token_ids, p.segments) for s in (1, 2, 3) for p in requests(200, known, s) if p.segments]
    for host_pages in (0, 150):
        rate = {}
        for policy in ("pgdsf", "lfu"):
            made, pool = store(given, 60, policy=policy, host_pages=host_pages, history=policy == "pgdsf")
            rate[policy] = replay(made, pool, asked, instructions=1).hit_rate
        assert rate["pgdsf"] > rate["lfu"] + 0.02, rate


def test_the_costlier_of_two_equal_documents_stays(tiny, tmp_path):
    """D is as long as E and as often used, but is read behind a long cached document, where tokens cost more."""
    made, pool = store(context(tiny, tmp_path), 64, host_mb=0)
    made.cost = PrefillCost((0, 100), (1, 100), ((1.0, 100.0), (3.0, 300.0)))
    long, (d, e, other) = documents(1, 100, 101)[0], documents(3, 40, 41, 8)
    first = [prompt(long, question=[1]), prompt(long, d, question=[1]), prompt(e, question=[1])]
    replay(made, pool, [(p.token_ids, p.segments) for p in first])
    held = {node.key[0]: node for node in made.tree.nodes()}
    worth = {key: made.tree.value(node, 0) for key, node in held.items()}
    assert worth[d[0]] > 2.5 * worth[e[0]]
    replay(made, pool, [(p.token_ids, p.segments) for p in [prompt(other, question=[1])]])
    assert made.cached(first[1].token_ids, first[1].segments) > 100
    assert made.cached(first[2].token_ids, first[2].segments) > 0  # there was room for all
    made.evict(1)
    assert made.cached(first[2].token_ids, first[2].segments) == 0
    assert made.tree.clocks[0] == worth[e[0]]


@pytest.mark.parametrize(("reorder", "hits"), [(False, 0), (True, 4)])
def test_room_for_one_document_and_two_in_turn(tiny, reorder, hits):
    """Six requests, D1 D2 D1 D2 D1 D2: two thirds are hits when those of one document run together."""
    known = documents(2, 40, 41)
    with load(tiny, [RagCache(host_mb=0, reorder=reorder)], kv_tokens=56, max_batch=1, max_context=56) as llm:
        asked = [prompt(known[i % 2], question=[7, 8, i + 10]) for i in range(6)]
        sent = [llm.engine.submit(p, GREEDY) for p in asked]
        llm.engine.run()
        assert all(r.failure is None for r in sent)
        assert sum(r.ledger.cached > 0 for r in sent) == hits


def test_nobody_is_overtaken_for_ever(tiny):
    """One request for D2 among many for D1, which is cached: it runs after at most three later ones."""
    known = documents(3, 40, 41)
    with load(tiny, [RagCache(reorder_window=3)], max_batch=1) as llm:
        llm.generate([prompt(known[0], question=[9])], GREEDY)
        asked = [prompt(known[int(i == 1)], question=[7, 8, i + 10]) for i in range(12)]
        sent = [llm.engine.submit(p, GREEDY) for p in asked]
        urgent = llm.engine.submit(prompt(known[2], question=[3]), GREEDY, priority=1)
        llm.engine.run()
        order = sorted(sent, key=lambda r: r.started_at or 0)
        overtook = [r for r in order[: order.index(sent[1])] if r.id > sent[1].id]
        assert len(overtook) == 3
        assert [r.id for r in order if r is not sent[1]] == [r.id for r in sent if r is not sent[1]]
        assert (urgent.started_at or 0) < min(r.started_at or 0 for r in sent)


# -- 5. computing ahead of the search ----------


class Scripted(StagedSearch):
    """Each stage takes ``wait`` polls."""

    def __init__(self, *stages: Documents, wait: int = 4) -> None:
        self.stages, self.wait, self.polls, self.told = list(stages), wait, 0, 0

    def poll(self) -> Candidates | None:
        self.polls += 1
        if self.polls < self.wait * (self.told + 1):
            return None
        self.told += 1
        return Candidates(self.stages[self.told - 1], self.told == len(self.stages))


def answers(llm: LLM, scripts: list[tuple[Documents, ...]], **options: int):
    known, pipeline = documents(6, 30, 60), RetrievalPipeline(llm.engine, **options)
    sent = [
        pipeline.submit(
            lambda found, i=i: prompt(*(known[n] for n in found), question=[9, i + 3]),
            Scripted(*script),
            GREEDY,
        )
        for i, script in enumerate(scripts)
    ]
    pipeline.run()
    assert [one.documents for one in sent] == [script[-1] for script in scripts]
    return sent


SCRIPTS: list[tuple[Documents, ...]] = [
    ((0, 1), (0, 1), (0, 1)),  # right from the start
    ((2, 3), (2, 4), (2, 4)),  # right at the second try
    ((4, 5), (4, 5), (5, 4)),  # wrong: the order counts
    ((), (1, 2)),  # nothing to guess from
]


def test_computing_ahead_changes_no_answer(tiny):
    with load(tiny, [], prefix_cache=False) as llm:
        want = [one.request.completion().token_ids for one in answers(llm, SCRIPTS)]
    with load(tiny, [RagCache()], max_step_tokens=16) as llm:
        alone = [answers(llm, [script])[0] for script in SCRIPTS]
        assert [one.guesses for one in alone] == [1, 2, 1, 0]
        assert [one.hit for one in alone] == [True, True, False, False]
        assert alone[0].request.completion().token_ids == want[0]
        together = answers(llm, SCRIPTS, guesses=4)
        assert [one.request.completion().token_ids for one in together] == want
        check(stored(llm), llm.engine.cache.pool)
        assert llm.engine.cache.pool.used == len(stored(llm))


def test_a_wrong_guess_is_cancelled_and_its_documents_stay(tiny):
    with load(tiny, [RagCache()], max_step_tokens=16) as llm:
        (one,) = answers(llm, [((0, 1), (2, 3))])
        assert (one.guesses, one.hit) == (1, False)
        known = documents(6, 30, 60)
        left = stored(llm).cached([*known[0], *known[1]], (len(known[0]), len(known[0]) + len(known[1])))
        assert left >= len(known[0]) // SIZE * SIZE  # complete documents only
        assert llm.engine.requests == ()


def test_nothing_is_computed_ahead_while_prompts_are_read(tiny):
    with load(tiny, [RagCache()], max_step_tokens=16) as llm:
        busy = llm.engine.submit(prompt(documents(1, 400, 401, 5)[0], question=[4]), GREEDY)
        (one,) = answers(llm, [((0, 1), (0, 1), (0, 1))])
        assert one.guesses == 0
        assert busy.sequences[0].finish is FinishReason.LENGTH
    with load(tiny, [RagCache(speculate=0)]) as llm:
        assert answers(llm, [((0, 1), (0, 1))])[0].guesses == 0


# -- 6. the cost model (its error against the clock: benchmarks/ragcache.py --profile) ----------


def test_prefill_is_profiled_once_and_between_the_points_it_is_bilinear(tiny, monkeypatch):
    with load(tiny, [RagCache()]) as llm:
        cost = stored(llm).cost
        assert len(cost.cached) > 1
        assert len(cost.new) > 1
    monkeypatch.setattr("hasten.lm.kvcache.prefill_cost.measure", None)
    with load(tiny, [RagCache()]) as llm:
        assert stored(llm).cost == cost
    for i, a in enumerate(cost.cached):
        for j, b in enumerate(cost.new):
            assert cost(a, b) == pytest.approx(cost.seconds[i][j])
