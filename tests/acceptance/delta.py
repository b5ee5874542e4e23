"""Acceptance of `delta` (checks 1, 2, 4 and 6 of its specification; 3 and 5, quality at 8K and speed, are to come)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.attention.delta import Delta, DeltaPolicy, choose_layers, selection_layers
from hasten.attention.policy import Dense, TokenSelection
from hasten.core.errors import SettingError
from hasten.kernels.page_mass import PageRule, page_choose, page_mass
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import open_checkpoint
from hasten.models.context import BuildContext

from ..lm.lm_tiny import write_checkpoint

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("delta") / "tiny", layers=6, heads=6, kv_heads=2, head_size=16
    )


def delta(**settings: object) -> Delta:
    """Sparse from 65 tokens on; layers 2, 3 and 5 are sparse."""
    return Delta(**{"pages": 8, "page": 8, "recent": 2, "full": (0, 1, 4), **settings})


def prompts(count: int, low: int = 40, high: int = 200) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(low, high, count)]


def run(model: Path, use: list[object], given: list[list[int]], **engine: object) -> list[tuple[int, ...]]:
    with LLM(model, use=use, dtype="float32", **engine) as llm:
        return [c.token_ids for c in llm.generate(given, GREEDY)]


# -- 1. ----------


def test_as_many_pages_as_there_are_change_nothing(tiny):
    given = prompts(3)
    assert run(tiny, [delta(pages=64)], given) == run(tiny, [], given)


# -- 2. ----------


@pytest.mark.parametrize("length", [1, 7, 8, 65, 200])
def test_page_masses_are_the_explicit_softmax_max_and_sum(length):
    q_RHD, k_NGPD, table_RM = cached(length)
    got = page_mass(q_RHD, k_NGPD, table_RM, torch.tensor([length], dtype=torch.int32), 8, scale=0.5)
    k_GLD = k_NGPD[table_RM[0].long()].transpose(0, 1).flatten(1, 2)[:, :length]
    logits = np.einsum(
        "hd,hld->hl", q_RHD[0].double().numpy(), k_GLD.repeat_interleave(3, 0).double().numpy()
    )
    p = np.exp(logits * 0.5)
    a = (p / p.sum(-1, keepdims=True)).max(0)
    np.testing.assert_allclose(got[0].numpy(), [a[i : i + 8].sum() for i in range(0, length, 8)], atol=1e-5)


def cached(length: int, like: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of 9 query heads over keys of 3 heads, in pages of 16 that lie anywhere; all keys alike, if asked."""
    random = torch.Generator().manual_seed(length)
    k_NGPD = torch.randn(20, 3, 16, 24, generator=random)
    table_RM = torch.randperm(20, generator=random)[None].to(torch.int32)
    return torch.randn(1, 9, 24, generator=random) * 2, k_NGPD * (not like), table_RM


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("length", [320, 313, 136, 129])
def test_pages_are_sorted_unique_and_hold_the_last_ones(length, first):
    q_RHD, k_NGPD, table_RM = cached(length)
    rule = PageRule(8, 16, 5, first)
    index_RK, count_R = page_choose(
        q_RHD, k_NGPD, table_RM, torch.tensor([length], dtype=torch.int32), rule, scale=0.5
    )
    chosen, pages = index_RK[0, : int(count_R)].tolist(), -(-length // 8)
    assert chosen == sorted(set(chosen))
    assert set(range((pages - 5) * 8, length)) <= set(chosen)
    assert len({t // 8 for t in chosen}) == min(16, pages)
    assert not first or 0 in chosen


def test_of_equal_pages_the_earlier_are_read():
    length = torch.tensor([160], dtype=torch.int32)
    q_RHD, k_NGPD, table_RM = cached(160, like=True)
    index_RK, _ = page_choose(q_RHD, k_NGPD, table_RM, length, PageRule(8, 6, 2), scale=0.5)
    assert index_RK[0, ::8].tolist() == [0, 8, 16, 24, 144, 152]


def test_sparse_layers_read_what_the_selection_layer_before_them_chose(tiny, monkeypatch):
    """The choice is made anew in each step, from the query heads' own scores; layers that follow reuse it."""
    (ids,) = prompts(1, 150, 151)
    seen: list[tuple[int, object]] = []
    select = DeltaPolicy.select

    def spy(self, layer, q_THD, pages, layout, spec):
        seen.append((layer, select(self, layer, q_THD, pages, layout, spec)))
        return seen[-1][1]

    monkeypatch.setattr(DeltaPolicy, "select", spy)
    monkeypatch.setattr(DeltaPolicy, "selectors", lambda self: ())  # asked layer by layer, in every step
    run(tiny, [delta()], [ids])
    steps = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert all(isinstance(choice, Dense) for _, choice in steps[0])  # the prompt
    lists = []
    for step in steps[1:]:
        kinds = [type(choice) for _, choice in step]
        assert kinds == [Dense, Dense, TokenSelection, TokenSelection, Dense, TokenSelection]
        two, three, five = (step[layer][1] for layer in (2, 3, 5))
        assert torch.equal(two.index_RXK, three.index_RXK)
        assert torch.equal(two.index_RXK[:, 0], two.index_RXK[:, 1])
        lists += [two.index_RXK[0, 0, :-16].tolist(), five.index_RXK[0, 0, :-16].tolist()]
    assert len({tuple(chosen) for chosen in lists}) > 2


@pytest.mark.parametrize("page_size", [16, 64])
def test_steps_in_one_native_call_choose_what_the_layers_choose_one_by_one(tiny, monkeypatch, page_size):
    given = prompts(3, 80, 200)
    native = run(tiny, [delta()], given, page_size=page_size)
    monkeypatch.setattr(DeltaPolicy, "selectors", lambda self: ())
    assert run(tiny, [delta()], given, page_size=page_size) == native
    assert run(tiny, [], given, page_size=page_size) != native


# -- 4. ----------


def test_attended_tokens_are_as_few_as_the_pages_say(tiny, monkeypatch):
    """Counted: with 8 of 63 pages in 3 of 6 layers, under 0.6 of what dense layers read."""
    read: list[float] = []
    select = DeltaPolicy.select

    def spy(self, layer, q_THD, pages, layout, spec):
        choice = select(self, layer, q_THD, pages, layout, spec)
        if isinstance(choice, TokenSelection):
            read.append(float(choice.count_RX[0, 0]) / int(layout.kv_len_S[0]))
        elif bool(layout.decode_rows().all()):
            read.append(1.0)
        return choice

    monkeypatch.setattr(DeltaPolicy, "select", spy)
    monkeypatch.setattr(DeltaPolicy, "selectors", lambda self: ())
    run(tiny, [delta()], prompts(1, 470, 471))
    assert 0.5 < np.mean(read) < 0.6


# -- 6. ----------


def test_short_and_long_sequences_of_a_batch_are_answered_as_if_alone(tiny):
    given = prompts(5)
    alone = [run(tiny, [delta()], [ids], prefix_cache=False)[0] for ids in given]
    assert run(tiny, [delta()], given) == alone
    assert run(tiny, [delta()], given, max_step_tokens=33) == alone
    assert alone != run(tiny, [], given)  # the choice is felt at all


def test_delta_can_be_repaired(tiny):
    from hasten.attention.resa import Resa

    over = "delta:pages=8,page=8,recent=2,selections=1,calibration_tokens=64"
    assert all(len(out) == 24 for out in run(tiny, [Resa(over=over, every=4)], prompts(2)))


# -- the layers that choose ----------


def test_selection_layers_are_those_that_a_sparse_layer_follows():
    assert selection_layers((0, 1, 2, 14, 22), 28) == {2, 14, 22}
    assert selection_layers((0, 1, 5), 6) == {1}


def test_calibration_avoids_a_layer_that_looks_elsewhere():
    cover = torch.full((8, 8), 0.9)
    cover[1, 4:] = 0.3  # layer 1 serves the later layers badly
    cover[3] = 0.1  # layer 3 serves none
    assert choose_layers(cover, 1) == (0, 1, 2)
    cover[2, 6:] = 0.2
    full = choose_layers(cover, 2)
    assert full[:2] == (0, 1)
    assert 3 not in full


def test_calibration_is_kept_and_deterministic(tiny, tmp_path):
    context = BuildContext.of(open_checkpoint(tiny), tmp_path, calibration=prompts(3))
    settings = delta(full=None, selections=2, calibration_tokens=128)
    first = settings.provide("attention_policy", context)
    again = settings.provide("attention_policy", context)
    assert first.full == again.full
    assert {0, 1} < first.full
    assert len(first.full) == 4
    assert len(list(tmp_path.glob("delta-coverage-*"))) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"full": (1, 2)}, "layer 0"), ({"full": (0, 6)}, r"0\.\.5"), ({"recent": 9}, "room within pages")],
)
def test_refuses_layers_and_pages_that_do_not_fit(tiny, settings, match):
    with pytest.raises(SettingError, match=match):
        LLM(tiny, use=[delta(**settings)], dtype="float32")
