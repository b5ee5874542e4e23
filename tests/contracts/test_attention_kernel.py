"""What every attention kernel owes the engine: exact output for every selection it reads, whatever the step looks like.

Runs over the default kernel and every technique of the catalogue that fills the slot.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention.dense import DenseKernel
from hasten.attention.flash_attention import FlashAttention
from hasten.attention.flash_attention2 import FlashAttention2
from hasten.attention.hydragen import Hydragen
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, HeadShape
from hasten.attention.policy import Dense, DenseScores, TokenSelection
from hasten.catalog import loader
from hasten.core.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from attention_steps import (
    make_layout,
    naive_attention,
    naive_scores,
    random_pages,
    random_queries,
    random_step,
    weighted_values,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[], AttentionKernel]


def _kernels() -> list[object]:
    """The default kernel, techniques as published, and settings that exercise them on small steps."""
    found: list[object] = [
        pytest.param(DenseKernel, id="dense"),
        pytest.param(lambda: Hydragen(min_prefix=1).provide("attention_kernel", None), id="hydragen-small"),  # type: ignore[arg-type]
        pytest.param(lambda: FlashAttention(min_rows=2).provide("attention_kernel", None), id="flash-small"),  # type: ignore[arg-type]
        pytest.param(
            lambda: FlashAttention2(min_rows=1).provide("attention_kernel", None), id="flash2-small"
        ),  # type: ignore[arg-type]
    ]
    for record in loader.select(slot="attention_kernel"):
        if record.built:
            technique = record.load()
            found.append(
                pytest.param(lambda t=technique: t().provide("attention_kernel", None), id=record.slug)  # type: ignore[misc]
            )
    return found


@pytest.fixture(params=_kernels(), scope="module")
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 4, 16]),
    sequences=st.integers(1, 7),
    shape=st.sampled_from([(1, 1, 8), (6, 2, 16), (3, 3, 40)]),
    window=st.sampled_from([None, 1, 7]),
    softcap=st.sampled_from([None, 15.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_dense_is_exact(
    make: Make,
    seed: int,
    page: int,
    sequences: int,
    shape: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    layout, pool = random_step(random.Random(seed), page=page, sequences=sequences)
    spec = AttentionSpec(HeadShape(*shape), 0.3, window, softcap)
    pages = random_pages(seed, pool, page, spec.shape, dtype)
    q = random_queries(seed + 1, layout.rows, spec.shape)
    kernel = make()
    out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
    assert out.shape == q.shape
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5)


def test_one_plan_serves_layers_that_differ(make: Make) -> None:
    layout, pool = random_step(random.Random(1), page=4, sequences=5)
    kernel = make()
    plan = kernel.plan(layout)
    for layer, (shape, window) in enumerate(
        [((6, 2, 16), None), ((6, 2, 16), 5), ((4, 4, 8), None), ((6, 2, 16), 5)]
    ):
        spec = AttentionSpec(HeadShape(*shape), 0.3, window)
        pages = random_pages(layer, pool, 4, spec.shape, torch.float32)
        q = random_queries(layer, layout.rows, spec.shape)
        out = kernel.run(plan, layer, q, pages, layout, spec, Dense())
        torch.testing.assert_close(
            out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5
        )


def test_a_step_does_not_remember_another(make: Make) -> None:
    """One kernel over many unrelated steps, some with ids and sizes it has seen."""
    kernel, rng = make(), random.Random(4)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    for step in range(20):
        layout, pool = random_step(rng, page=4, sequences=rng.randint(1, 4))
        pages = random_pages(step, pool, 4, spec.shape, torch.float32)
        q = random_queries(step, layout.rows, spec.shape)
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
        torch.testing.assert_close(
            out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5
        )


def test_decoding_step_by_step(make: Make) -> None:
    kernel, page = make(), 4
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3, 11)
    pages = random_pages(0, 100, page, spec.shape, torch.float32)
    shared, lengths = [90, 91, 92], [14, 13, 18]
    for step in range(10):
        lengths = [n + 1 for n in lengths]
        tables = [[*shared, *range(20 * i, 20 * i + -(-n // page) - 3)] for i, n in enumerate(lengths)]
        layout = make_layout(tables, lengths, [1, 1, 1], page)
        q = random_queries(step, 3, spec.shape)
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
        torch.testing.assert_close(
            out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5
        )


def test_scores_are_observed_or_refused(make: Make) -> None:
    layout, pool = random_step(random.Random(3), page=4, sequences=4)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(0, pool, 4, spec.shape, torch.float32)
    q = random_queries(1, layout.rows, spec.shape)
    kernel, got = make(), []
    plan = kernel.plan(layout)
    try:
        out = kernel.run(plan, 2, q, pages, layout, spec, DenseScores(), lambda *given: got.append(given))
    except UnsupportedError:
        return
    torch.testing.assert_close(out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5)
    ((layer, probs, seen),) = got
    assert (layer, seen) == (2, layout)
    torch.testing.assert_close(probs.double(), naive_scores(q, pages, layout, spec), atol=1e-5, rtol=1e-5)


def test_chosen_tokens_are_exact_or_refused(make: Make) -> None:
    """Row 0 sees its first token only; the other rows everything."""
    layout, pool = random_step(random.Random(3), page=4, sequences=4)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(0, pool, 4, spec.shape, torch.float32)
    q = random_queries(1, layout.rows, spec.shape)
    choice = TokenSelection(
        torch.tensor([0]), torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)
    )
    kernel = make()
    try:
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, choice)
    except UnsupportedError:
        return
    probs = naive_scores(q, pages, layout, spec)
    probs[0] = 0.0
    probs[0, :, 0] = 1.0
    expected = weighted_values(probs, pages, layout, spec)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_unknown_selection_is_refused(make: Make) -> None:
    layout, pool = random_step(random.Random(3), page=4, sequences=2)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(0, pool, 4, spec.shape, torch.float32)
    kernel = make()
    with pytest.raises(UnsupportedError):
        kernel.run(
            kernel.plan(layout), 0, random_queries(1, layout.rows, spec.shape), pages, layout, spec, object()
        )  # type: ignore[arg-type]
