"""Acceptance of `flashinfer` (checks 1, 2, 3, 4 and 6 of its specification).

5, and the time of planning, are speed claims: `python -m benchmarks.flashinfer`. The merge operator is tested by
property in tests/kernels/test_merge.py; here its laws on states that attention itself made. Variants are compiled with
the C++ compiler that hasten was built with, once per session.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.attention.dense import DenseKernel
from hasten.attention.flashinfer import BatchAttention, FlashInfer, FlashInferKernel
from hasten.attention.flashinfer_format import BlockSparse, levels, pieces_of
from hasten.attention.hydragen import prefix_tree
from hasten.attention.layout import HeadShape
from hasten.attention.pieces import Rows, finish, sequence_pieces
from hasten.kernels.attention import merge
from hasten.kernels.schedule import Schedule
from hasten.kernels.variants import VANILLA
from hasten.kernels.variants_known import ALIBI, KNOWN, MASK, ROPE, SIGMOID, SINKS
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams

from ..lm.lm_tiny import write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from attention_steps import make_layout, random_step
from flashinfer_reference import (
    pack_masks,
    random_format,
    random_pages,
    reference,
    tree_mask,
)

SHAPES = [HeadShape(2, 2, 64), HeadShape(6, 2, 64), HeadShape(8, 1, 32), HeadShape(3, 1, 20)]
SHAPE = HeadShape(6, 2, 64)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder that all test processes of the session share."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "variants-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(home))
        yield home


def queries(rows: int, shape: HeadShape, seed: int = 1) -> Tensor:
    return torch.randn(rows, shape.heads, shape.size, generator=torch.Generator().manual_seed(seed))


def check(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    if got[1] is not None:
        torch.testing.assert_close(got[1].double(), expected[1], atol=1e-5, rtol=1e-5)


# -- 1. all variants equal a dense reference ----------

CASES = [
    pytest.param(seed, page, shape, id=f"page{page}-{shape.heads}x{shape.kv_heads}x{shape.size}")
    for seed, (page, shape) in enumerate((page, shape) for page in (1, 5, 16) for shape in SHAPES)
]


class Case:
    """A random ragged batch, planned for eight workers with chunks as short as 16 tokens."""

    def __init__(self, seed: int, page: int, shape: HeadShape, *, causal: bool = True, rows: int = 9) -> None:
        rng = random.Random(seed)
        self.shape, self.rng = shape, rng
        self.format, pool = random_format(
            rng, page=page, requests=rng.randint(2, 6), most_rows=rows, most_tokens=90, causal=causal
        )
        self.pages = random_pages(seed, pool, page, shape, torch.float32)
        self.rows = int(self.format.qo_indptr_B1[-1])
        self.q = queries(self.rows, shape, seed)
        self.attention = BatchAttention(shape, workers=8)
        self.attention.plan([self.format], self.rows)

    def run(self, variant, **params):
        return self.attention.run(self.q, self.pages, 0.125, variant, **params)

    def expect(self, *rest, **named):
        return reference(self.q, self.pages, self.format, self.shape, 0.125, *rest, **named)


@pytest.fixture(autouse=True, scope="module")
def short_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.attention.pieces.MIN_CHUNK", 16)
        yield


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_plain_window_and_softcap(seed: int, page: int, shape: HeadShape) -> None:
    case = Case(seed, page, shape)
    check(case.run(VANILLA), case.expect())
    capped = case.run(VANILLA, softcap=2.0)
    check(capped, case.expect(lambda x, *_: 2.0 * torch.tanh(x / 2.0)))
    for window in (1, 7, 40):
        attention = BatchAttention(shape, window=window, workers=8)
        attention.plan([case.format], case.rows)
        check(attention.run(case.q, case.pages, 0.125), case.expect(window=window))


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_alibi(seed: int, page: int, shape: HeadShape) -> None:
    case = Case(seed, page, shape)
    slopes = 2.0 ** -torch.arange(1.0, shape.heads + 1)
    got = case.run(ALIBI, slopes=slopes)
    check(got, case.expect(lambda x, b, qo, at, kv: x + slopes.double()[:, None] * (kv - at)))


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_token_trees(seed: int, page: int, shape: HeadShape) -> None:
    """Rows are nodes of a random tree after the cached tokens; a row may see nothing at all."""
    case = Case(seed, page, shape, causal=False)
    count = np.diff(case.format.qo_indptr_B1)
    masks = []
    for rows, tokens in zip(count.tolist(), case.format.kv_len_B.tolist(), strict=True):
        mask = torch.zeros(rows, tokens, dtype=torch.bool)
        if tokens >= rows:
            mask = tree_mask(case.rng, rows, tokens)
        mask[0] &= case.rng.random() < 0.7
        masks.append(mask)
    bits, start = pack_masks(masks)
    got = case.run(MASK, bits=bits, start=start)
    check(got, case.expect(lambda x, b, qo, at, kv: x.masked_fill(~masks[b][qo][kv], float("-inf"))))


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_sigmoid_without_softmax(seed: int, page: int, shape: HeadShape) -> None:
    case = Case(seed, page, shape)
    out, lse = case.run(SIGMOID, bias=-1.5)
    assert lse is None
    check((out, None), case.expect(lambda x, *_: torch.sigmoid(x - 1.5), softmax=False))


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_sinks_count_once_however_a_row_is_cut(seed: int, page: int, shape: HeadShape) -> None:
    case = Case(seed, page, shape)
    sinks = torch.randn(shape.heads, generator=torch.Generator().manual_seed(seed))
    out, lse = case.run(SINKS, sinks=sinks)
    expected, total = case.expect(sinks_H=sinks)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    seen = ~torch.isinf(total)
    assert lse is not None
    torch.testing.assert_close(lse.double()[seen], total[seen], atol=1e-5, rtol=1e-5)


def rope_tables(positions: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] / 10000.0 ** (torch.arange(size // 2) / (size // 2))
    return torch.cos(angle).float(), torch.sin(angle).float()


@pytest.mark.parametrize(("seed", "page", "shape"), CASES)
def test_rope_on_read(seed: int, page: int, shape: HeadShape) -> None:
    case = Case(seed, page, shape)
    cos, sin = rope_tables(256, shape.size)

    def rotate(x_LHD: Tensor, at_L: Tensor) -> Tensor:
        half = shape.size // 2
        c, s = cos.double()[at_L][:, None], sin.double()[at_L][:, None]
        a, b = x_LHD[..., :half], x_LHD[..., half:]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    check(case.run(ROPE, cos=cos, sin=sin), case.expect(rotate=rotate))


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 96, 97, 257])
@pytest.mark.parametrize("variant", ["vanilla", "alibi"])
def test_chunks_of_any_length_after_a_cached_context(rows: int, variant: str) -> None:
    rng = random.Random(rows)
    shape, page, before = SHAPE, 16, 75
    pages = -(-(rows + before) // page)
    last = rows + before - (pages - 1) * page
    format = BlockSparse(
        np.array([0, rows]),
        np.array([0, pages]),
        np.array(rng.sample(range(40), pages)),
        np.array([last]),
        page,
    )
    pool, q = random_pages(rows, 40, page, shape, torch.float32), queries(rows, shape)
    attention = BatchAttention(shape, workers=8)
    attention.plan([format], rows)
    if variant == "vanilla":
        check(attention.run(q, pool, 0.125), reference(q, pool, format, shape, 0.125))
        return
    slopes = 2.0 ** -torch.arange(1.0, 7.0)
    expected = reference(
        q, pool, format, shape, 0.125, lambda x, b, qo, at, kv: x + slopes.double()[:, None] * (kv - at)
    )
    check(attention.run(q, pool, 0.125, ALIBI, slopes=slopes), expected)


# -- 2. the same bits ----------


def test_same_bits_in_every_run_and_with_one_or_two_threads() -> None:
    format, pool = random_format(random.Random(5), page=16, requests=9, most_rows=130, most_tokens=700)
    pages, rows = random_pages(5, pool, 16, SHAPE, torch.float32), int(format.qo_indptr_B1[-1])
    q = queries(rows, SHAPE)
    attention = BatchAttention(SHAPE, workers=8)
    plan = attention.plan([format], rows)
    assert plan.schedule.facts().slots > 0
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for variant, params in ((VANILLA, {}), (SINKS, {"sinks": sinks})):
        first, first_lse = attention.run(q, pages, 0.125, variant, **params)
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            out, lse = attention.run(q, pages, 0.125, variant, **params)
            assert torch.equal(out, first)
            assert torch.equal(lse, first_lse)


# -- 3. plans ----------


def skewed(seed: int) -> BlockSparse:
    """1 to 64 requests whose lengths follow a Zipf law between 16 and 8192; some bring a prefill chunk."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 65))
    tokens = np.clip((8192 * rng.zipf(1.6, count) ** -0.9 * rng.uniform(0.3, 1, count)).astype(int), 16, 8192)
    rows = np.where(rng.random(count) < 0.2, np.minimum(tokens, rng.integers(1, 400, count)), 1)
    pages = -(-tokens // 16)
    start = np.concatenate(([0], np.cumsum(pages)))
    last = tokens - (pages - 1) * 16
    return BlockSparse(np.concatenate(([0], np.cumsum(rows))), start, np.arange(start[-1]), last, 16)


def schedule_of(format: BlockSparse, workers: int = 8) -> Schedule:
    return finish(
        format.pieces(), int(format.qo_indptr_B1[-1]), format.page_size, 9, 3, workers, min_chunk=128
    ).schedule


@pytest.mark.parametrize("seed", range(40))
def test_workers_are_evenly_loaded(seed: int) -> None:
    """Largest over mean cost at most 1.1 wherever there is more than a shortest chunk for each worker to do."""
    format = skewed(seed)
    facts = schedule_of(format).facts()
    assert facts.unevenness <= 1.1
    assert len(facts.load_W) == 8


@pytest.mark.parametrize("seed", range(8))
def test_the_workspace_is_bounded(seed: int) -> None:
    """Floats of partial states, all heads together: 2 C Tq (d + 1), times four as limits may be four times smaller."""
    facts = schedule_of(skewed(seed)).facts()
    heads, size, tile, workers = 9, 64, 96, 8
    assert facts.slots * heads * (size + 1) <= 4 * 2 * workers * tile * (size + 1)


def test_unsplit_tiles_are_written_through() -> None:
    facts = schedule_of(skewed(3), workers=1).facts()
    assert facts.slots == 0
    assert (facts.task_K7[:, 6] == -1).all()


def test_one_plan_serves_all_layers_and_moves_with_the_steps(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Schedule] = []
    before = Schedule.__init__

    def count(self: Schedule, *given: object, **named: object) -> None:
        made.append(self)
        before(self, *given, **named)

    path = write_checkpoint(
        tmp_path_factory.mktemp("flashinfer") / "tiny", layers=4, heads=4, kv_heads=2, head_size=16
    )
    monkeypatch.setattr(Schedule, "__init__", count)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with LLM(path, use=[FlashInfer()], dtype="float32", page_size=32, threads=1) as llm:
        llm.generate([[5, 6, 7, 8, 9]], params)
    # The prompt and the first decode step; the other steps stay in its page.
    assert len(made) == 2


def test_the_engine_runs_whole_steps_on_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On packed weights a step is one native call: the kernel's `run` is never asked."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("flashinfer") / "tiny", layers=3, heads=4, kv_heads=2, head_size=16
    )
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = [[*range(5, 60), i] for i in range(4)]
    with LLM(path, dtype="bfloat16", page_size=4, threads=1) as llm:
        expected = [c.token_ids for c in llm.generate(prompts, params)]
    use = [FlashInfer(min_prefix=4, workers=8)]
    monkeypatch.setattr(DenseKernel, "run", None)
    with LLM(path, use=use, dtype="bfloat16", page_size=4, threads=1) as llm:
        assert isinstance(llm.engine.runner.kernel, FlashInferKernel)
        assert [c.token_ids for c in llm.generate(prompts, params)] == expected
        assert llm.engine.runner.kernel.rebuilt > 0


# -- 4. merging states; composable formats ----------


def states(cuts: list[int], shape: HeadShape) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """States of four rows over consecutive parts of 64 tokens (single-token pages), and over all of them."""
    pages, q = random_pages(0, 64, 1, shape, torch.float32), queries(4, shape)

    def state(begin: int, end: int) -> tuple[Tensor, Tensor]:
        format = BlockSparse(
            np.array([0, 4]),
            np.array([0, end - begin]),
            np.arange(begin, end),
            np.array([min(end - begin, 1)]),
            1,
            False,
        )
        attention = BatchAttention(shape, workers=1)
        attention.plan([format], 4)
        out, lse = attention.run(q, pages, 0.2)
        assert lse is not None
        return out, lse

    ends = np.cumsum(cuts).tolist()
    return [state(end - size, end) for size, end in zip(cuts, ends, strict=True)], state(0, 64)


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    count, rows = len(parts), parts[0][0].shape[0]
    start = torch.arange(rows + 1, dtype=torch.int32) * count
    entry = torch.arange(rows * count, dtype=torch.int32).view(count, rows).T.contiguous().view(-1)
    return merge(torch.cat([o for o, _ in parts]), torch.cat([x for _, x in parts]), start, entry)


@pytest.mark.parametrize("cuts", [[64], [10, 54], [1, 63], [0, 64], [20, 20, 24], [0, 0, 64]])
def test_states_merge_in_any_order_and_grouping(cuts: list[int]) -> None:
    parts, whole = states(cuts, SHAPE)
    ways = [parts, parts[::-1]]
    if len(parts) > 2:
        ways += [[merged(parts[:2]), parts[2]], [parts[0], merged(parts[1:])]]
    for way in ways:
        got = merged(way)
        torch.testing.assert_close(got[0], whole[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1], whole[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("page", [1, 4])
def test_composable_formats_equal_the_single_one(seed: int, page: int) -> None:
    layout, pool = random_step(random.Random(seed), page=page, sequences=7)
    rows = Rows.of(layout)
    shareable = (rows.length_S - np.diff(rows.start_S1)) // page
    formats = levels(rows, prefix_tree(rows.table_SM, shareable))
    single = BlockSparse.of_layout(layout)
    pages, q = random_pages(seed, pool, page, SHAPE, torch.float32), queries(layout.rows, SHAPE)
    assert len(formats) > 1
    got = {}
    for name, chosen in (("composed", formats), ("single", [single])):
        attention = BatchAttention(SHAPE, workers=4)
        attention.plan(chosen, layout.rows)
        got[name] = attention.run(q, pages, 0.2)
    check(got["composed"], reference(q, pages, single, SHAPE, 0.2))
    check(got["single"], reference(q, pages, single, SHAPE, 0.2))
    # Every page of a level is read once, by all rows that share it.
    read = [part.kv_indices_C.tolist() for part in formats]
    assert sum(map(len, read)) < len(single.kv_indices_C)


@pytest.mark.parametrize("variant", [ALIBI, SINKS, ROPE], ids=lambda v: v.name)
def test_variants_see_the_same_positions_in_every_format(variant) -> None:
    shared, own = list(range(6)), [list(range(6 + 3 * i, 9 + 3 * i)) for i in range(5)]
    layout = make_layout([shared + pages for pages in own], [33, 34, 35, 36, 30], [1, 2, 1, 3, 1], 4)
    rows = Rows.of(layout)
    tree = prefix_tree(rows.table_SM, (rows.length_S - np.diff(rows.start_S1)) // 4)
    pages, q = random_pages(3, 30, 4, SHAPE, torch.float32), queries(layout.rows, SHAPE)
    cos, sin = rope_tables(64, 64)
    params = {
        "alibi": {"slopes": torch.rand(6)},
        "sinks": {"sinks": torch.randn(6)},
        "rope": {"cos": cos, "sin": sin},
    }
    outs = []
    for chosen in (levels(rows, tree), [BlockSparse.of_layout(layout)]):
        attention = BatchAttention(SHAPE, workers=4)
        attention.plan(chosen, layout.rows)
        outs.append(attention.run(q, pages, 0.2, variant, **params[variant.name])[0])
    assert len(levels(rows, tree)) == 2
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


def test_the_engines_layout_is_a_format() -> None:
    layout, _ = random_step(random.Random(2), page=4, sequences=6)
    format = BlockSparse.of_layout(layout)
    assert format.kv_len_B.tolist() == layout.kv_len_S.tolist()
    assert (format.last_page_len_B >= 1).all()
    assert (format.last_page_len_B <= 4).all()
    ours, engine = pieces_of([format]), sequence_pieces(Rows.of(layout))
    for name in ("page_C", "page_start_J1", "base_J", "row_start_J1", "row_E", "first_E", "limit_E"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(engine, name))


# -- 6. a variant is a few lines ----------


@pytest.mark.parametrize("variant", KNOWN.values(), ids=lambda v: v.name)
def test_a_variant_is_less_than_twenty_lines(variant) -> None:
    bodies = [variant.query_transform, variant.key_transform, variant.logits_transform, variant.logits_mask]
    lines = [line for body in (*bodies, variant.update) for line in body.splitlines() if line.strip()]
    assert 0 < len(lines) < 20
