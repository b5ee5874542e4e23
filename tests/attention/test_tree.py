"""Token trees: `tree_pieces` through the dense kernel against softmax under an explicit mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.pieces import depths
from hasten.attention.policy import Dense
from hasten.core.errors import UnsupportedError

SHAPE = HeadShape(4, 2, 16)

trees = st.integers(0, 16).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))))


def layout_of(committed: list[int], parents: list[tuple[int, ...]], page: int, seed: int) -> StepLayout:
    """A decode row per sequence, then its nodes; page ids shuffled."""
    rows = [1 + len(p) for p in parents]
    lengths = [c + len(p) for c, p in zip(committed, parents, strict=True)]
    width = max(-(-n // page) for n in lengths)
    pages = torch.randperm(width * len(rows), generator=torch.Generator().manual_seed(seed)).view(-1, width)
    places = [[c - 1, *(c + depths(p)).tolist()] for c, p in zip(committed, parents, strict=True)]
    return StepLayout(
        query_start_S1=torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32),
        kv_len_S=torch.tensor(lengths, dtype=torch.int32),
        page_table_SM=pages.to(torch.int32),
        position_T=torch.tensor([x for place in places for x in place]),
        slot_T=torch.zeros(sum(rows), dtype=torch.int64),
        page_size=page,
        sequence_ids=tuple(range(len(rows))),
        trees={s: p for s, p in enumerate(parents) if p},
    )


def reference(layout, parents, q_THD, k_NGPD, v_NGPD, scale, window):
    """Row by row, sequence by sequence: gather the tokens a node sees, softmax over them."""
    out = torch.empty_like(q_THD)
    for s, tree in enumerate(parents):
        begin, length = int(layout.query_start_S1[s]), int(layout.kv_len_S[s])
        committed = length - len(tree)
        ids = layout.page_table_SM[s].long()
        k_GLD, v_GLD = (x[ids].transpose(0, 1).flatten(1, 2).float() for x in (k_NGPD, v_NGPD))
        place = list(range(committed)) + (committed + depths(tree)).tolist()
        for row in range(1 + len(tree)):
            seen, node = list(range(committed)), row - 1
            while node >= 0:
                seen.append(committed + node)
                node = tree[node]
            if window is not None:
                own = place[committed - 1 + row]
                seen = [t for t in seen if place[t] > own - window]
            q_GHD = q_THD[begin + row].view(SHAPE.kv_heads, -1, SHAPE.size)
            probs = torch.softmax(q_GHD @ k_GLD[:, seen].transpose(1, 2) * scale, -1)
            out[begin + row] = (probs @ v_GLD[:, seen]).flatten(0, 1)
    return out


@settings(max_examples=60, deadline=None)
@given(
    parents=st.lists(trees, min_size=1, max_size=3),
    committed=st.lists(st.integers(1, 300), min_size=3, max_size=3),
    page=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 17, 40]),
    seed=st.integers(0, 99),
)
def test_a_node_sees_its_ancestors_and_nothing_else(parents, committed, page, window, seed):
    torch.manual_seed(seed)
    layout = layout_of(committed[: len(parents)], parents, page, seed)
    count = layout.page_table_SM.numel()
    k_NGPD, v_NGPD = torch.randn(2, count, SHAPE.kv_heads, page, SHAPE.size)
    q_THD = torch.randn(layout.rows, SHAPE.heads, SHAPE.size)
    kernel, spec = DenseKernel(), AttentionSpec(SHAPE, 0.25, window)
    plan = kernel.plan(layout)
    found = kernel.run(plan, 0, q_THD, KVPages(k_NGPD, v_NGPD), layout, spec, Dense())
    torch.testing.assert_close(
        found, reference(layout, parents, q_THD, k_NGPD, v_NGPD, 0.25, window), atol=2e-5, rtol=1e-4
    )


def test_a_window_shorter_than_the_tree_is_refused():
    layout = layout_of([20], [(-1, 0, 1, 2)], 4, 0)
    with pytest.raises(UnsupportedError, match="4 levels is deeper than the sliding window of 4"):
        DenseKernel().plan(layout).part(AttentionSpec(SHAPE, 1.0, 4))
