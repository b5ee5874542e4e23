from __future__ import annotations

import pytest
import torch

from hasten.lm.moe.router import TopKRouter

SLOT = "expert_router"
DEFAULTS = {"top-2": lambda: TopKRouter(2), "top-1": lambda: TopKRouter(1)}


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_every_token_gets_distinct_experts_and_weights(provider, rows):
    router = provider()
    logits_TX = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    expert_TK, weight_TK = router.route(0, logits_TX)
    assert expert_TK.shape == weight_TK.shape
    assert expert_TK.shape[0] == rows
    assert expert_TK.dtype == torch.int64
    assert weight_TK.dtype == torch.float32
    assert torch.isfinite(weight_TK).all()
    assert (weight_TK >= 0).all()
    assert ((expert_TK >= 0) & (expert_TK < 6)).all()
    for experts, weights in zip(expert_TK.tolist(), weight_TK.tolist(), strict=True):
        used = [e for e, w in zip(experts, weights, strict=True) if w > 0]
        assert len(set(used)) == len(used)
    again = router.route(0, logits_TX)
    assert torch.equal(again[0], expert_TK)
    assert torch.equal(again[1], weight_TK)


def test_top_k_is_a_softmax_over_the_best():
    expert, weight = TopKRouter(2).route(0, torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.5]]))
    assert expert.tolist() == [[1, 2], [2, 0]]
    torch.testing.assert_close(weight, torch.tensor([[3.0, 1.0], [2.5, 2.0]]).softmax(-1))
