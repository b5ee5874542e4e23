"""Block-sparse formats and `BatchAttention`: what fits, what is refused, and when the scheduler runs again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from attention_steps import make_layout, random_step
from flashinfer_reference import random_format, random_pages, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.flashinfer import BatchAttention, FlashInfer, FlashInferKernel
from hasten.attention.flashinfer_format import BlockSparse, levels, pieces_of
from hasten.attention.hydragen import Hydragen, HydragenKernel, prefix_tree
from hasten.attention.layout import HeadShape
from hasten.attention.pieces import Rows
from hasten.core.errors import SettingError
from hasten.kernels.variants import Variant

SHAPE = HeadShape(6, 2, 16)


def queries(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, SHAPE.heads, SHAPE.size, generator=torch.Generator().manual_seed(seed))


def small(**changed: Any) -> BlockSparse:
    """Three requests: 2 rows over 9 tokens, 1 row over 8, 1 row over nothing; pages of 4."""
    fields: dict[str, Any] = {
        "qo_indptr_B1": [0, 2, 3, 4],
        "kv_indptr_B1": [0, 3, 5, 5],
        "kv_indices_C": [7, 2, 0, 4, 1],
        "last_page_len_B": [1, 4, 0],
        "page_size": 4,
    }
    return BlockSparse(**(fields | changed))


def test_lengths() -> None:
    assert small().kv_len_B.tolist() == [9, 8, 0]
    pieces = small().pieces()
    assert pieces.limit_E.tolist() == [8, 9, 8, 0]
    assert small(causal=False).pieces().limit_E.tolist() == [9, 9, 8, 0]


def test_more_rows_than_tokens_see_what_there_is() -> None:
    """The first rows of a request come before its first cached token."""
    format = BlockSparse([0, 5], [0, 1], [0], [3], 4)
    assert format.pieces().limit_E.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"page_size": 0}, "page_size"),
        ({"last_page_len_B": [1, 4]}, "need 3 entries for 2 blocks"),
        ({"last_page_len_B": [0, 4, 0]}, "last_page_len_B must be 1 to 4"),
        ({"last_page_len_B": [5, 4, 0]}, "last_page_len_B must be 1 to 4"),
        ({"last_page_len_B": [1, 4, 1]}, "0 for a block without pages"),
        ({"kv_indptr_B1": [0, 3, 5, 6]}, "kv_indptr_B1 must rise from 0 to 5"),
        ({"kv_indptr_B1": [0, 4, 3, 5]}, "kv_indptr_B1"),
        ({"qo_indptr_B1": [1, 2, 3, 4]}, "qo_indptr_B1"),
        ({"kv_indices_C": [7, 2, -1, 4, 1]}, "kv_indices_C holds a negative"),
        ({"kv_indices_C": [7.0, 2.0, 0.0, 4.0, 1.0]}, "kv_indices_C must be a list of integers"),
        ({"kv_indices_C": [float("nan")] * 5}, "kv_indices_C must be a list of integers"),
        ({"kv_indices_C": [[7, 2, 0, 4, 1]]}, "kv_indices_C must be a list of integers"),
        ({"row_T": [0, 1, 2]}, "qo_indptr_B1 must rise from 0 to 3"),
        ({"row_T": [0, 1, 2, -1]}, "row_T holds a negative"),
        ({"base_B": [0]}, "base_B has 1 entries"),
        ({"base_B": [0, -4, 0]}, "base_B holds a negative"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**changed)


@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 5, 16]),
    requests=st.integers(0, 6),
    causal=st.booleans(),
    workers=st.sampled_from([1, 3, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(
    seed: int, page: int, requests: int, causal: bool, workers: int, dtype: torch.dtype
) -> None:
    format, pool = random_format(random.Random(seed), page=page, requests=requests, causal=causal)
    rows = int(format.qo_indptr_B1[-1])
    pages, q = random_pages(seed, pool, page, SHAPE, dtype), queries(rows, seed)
    attention = BatchAttention(SHAPE, workers=workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.attention.pieces.MIN_CHUNK", 8)
        attention.plan([format], rows)
    out, lse = attention.run(q, pages, 0.3)
    expected = reference(q, pages, format, SHAPE, 0.3)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_levels_are_the_tree_level_by_level(seed: int) -> None:
    """Pieces equal hydragen's, sorted; every query row is in a level at most once."""
    layout, _ = random_step(random.Random(seed), page=4, sequences=7)
    rows = Rows.of(layout)
    tree = prefix_tree(rows.table_SM, (rows.length_S - np.diff(rows.start_S1)) // 4)
    formats = levels(rows, tree)
    assert not formats[-1].causal or len(formats[-1].row_T) == layout.rows
    for level in formats:
        assert len(set(level.row_T.tolist())) == len(level.row_T)
    ours = pieces_of(formats)
    other = HydragenKernel(Hydragen(min_prefix=1)).pieces(rows, layout)

    def told(pieces: Any) -> list[tuple[Any, ...]]:
        return sorted(
            (
                int(pieces.base_J[j]),
                tuple(pieces.page_C[pieces.page_start_J1[j] : pieces.page_start_J1[j + 1]]),
                tuple(pieces.row_E[pieces.row_start_J1[j] : pieces.row_start_J1[j + 1]]),
                tuple(pieces.limit_E[pieces.row_start_J1[j] : pieces.row_start_J1[j + 1]]),
            )
            for j in range(len(pieces.base_J))
        )

    assert told(ours) == told(other)


def test_formats_of_different_pages_and_no_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="one page size"):
        pieces_of([small(), BlockSparse([0, 1], [0, 1], [0], [1], 8)])
    with pytest.raises(ValueError, match="at least one format"):
        pieces_of([])


def test_the_scheduler_runs_again_only_for_other_pages() -> None:
    """Lengths that grow within their pages move the plan; the result is that of a fresh one."""
    attention, pages, q = BatchAttention(SHAPE, window=7, workers=4), None, queries(3)
    for step, (last, ids, planned) in enumerate(
        [
            ([1, 2], [0, 1, 2, 3], 1),
            ([2, 3], [0, 1, 2, 3], 1),
            ([2, 3], [0, 1, 2, 3], 1),
            ([4, 4], [0, 1, 2, 3], 1),
            ([4, 4], [0, 1, 2, 5], 2),
        ]
    ):
        format = BlockSparse([0, 1, 3], [0, 2, 4], ids, last, 4)
        attention.plan([format], 3)
        assert attention.planned == planned, step
        pages = pages or random_pages(0, 6, 4, SHAPE, torch.float32)
        expected, _ = reference(q, pages, format, SHAPE, 0.3, window=7)
        out, _ = attention.run(q, pages, 0.3)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_misuse_is_refused() -> None:
    pages, q = random_pages(0, 8, 4, SHAPE, torch.float32), queries(4)
    attention = BatchAttention(SHAPE)
    with pytest.raises(ValueError, match="nothing is planned"):
        attention.run(q, pages, 0.3)
    with pytest.raises(ValueError, match="query row 3, but there are 3"):
        attention.plan([small()], 3)
    attention.plan([small()], 4)
    with pytest.raises(ValueError, match="another number of query rows"):
        attention.run(queries(5), pages, 0.3)
    with pytest.raises(ValueError, match="page past the end of the pool"):
        attention.run(q, random_pages(0, 7, 4, SHAPE, torch.float32), 0.3)
    with pytest.raises(ValueError, match="another page size"):
        attention.run(q, random_pages(0, 8, 2, SHAPE, torch.float32), 0.3)
    with pytest.raises(ValueError, match="another number of heads"):
        attention.run(torch.randn(4, 2, 16), pages, 0.3)
    with pytest.raises(ValueError, match="window must be positive"):
        BatchAttention(SHAPE, window=0)
    other = BatchAttention(SHAPE)
    other.plan([small(row_T=[3, 2, 1, 0])], 4)
    with pytest.raises(ValueError, match="hold all query rows, in order"):
        other.run(q, pages, 0.3, Variant("twice", logits_transform="return 2 * logit;"))


def test_settings_are_checked() -> None:
    assert isinstance(FlashInfer().provide("attention_kernel", None), FlashInferKernel)  # type: ignore[arg-type]
    for bad in ({"min_sharers": 1}, {"min_prefix": 0}, {"max_levels": 0}, {"workers": 0}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            FlashInfer(**bad)


@pytest.mark.parametrize(("composable", "count"), [(True, 2), (False, 1)])
def test_the_kernel_composes_what_is_shared(composable: bool, count: int) -> None:
    shared = list(range(8))
    tables = [[*shared, 10 + i] for i in range(3)]
    layout = make_layout(tables, [34] * 3, [1] * 3, 4)
    kernel = FlashInferKernel(FlashInfer(composable=composable, min_prefix=8))
    assert len(kernel.formats(Rows.of(layout), layout.sequence_ids)) == count
