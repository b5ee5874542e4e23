"""AdamW against its definition, and the learning rate's shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from hasten.core.errors import SettingError
from hasten.train.optimizer import AdamWSettings, adamw, learning_rate, load_state_tensors, state_tensors


def test_rate_rises_in_the_warm_up_and_falls_to_the_floor() -> None:
    settings = AdamWSettings(peak=1.0, warmup=10, floor=0.1)
    rates = [learning_rate(settings, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    middle = learning_rate(AdamWSettings(peak=1.0, warmup=0, floor=0.0), 50, 101)
    assert middle == pytest.approx(0.5)
    assert learning_rate(settings, 0, 1) == pytest.approx(0.1)  # shorter than its warm-up


def test_matches_the_definition_and_decays_matrices_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    settings = AdamWSettings(peak=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    optimizer = adamw(model, settings)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        optimizer.zero_grad()
        (model(torch.randn(7, 5)) ** 2).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            m[name] = 0.9 * m[name] + 0.1 * p.grad
            v[name] = 0.99 * v[name] + 0.01 * p.grad**2
            decay = 0.5 if name == "weight" else 0.0
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 0.1 * decay) - 0.1 * update
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-5, atol=1e-6)


def test_state_travels() -> None:
    model = nn.Linear(4, 2)
    first = adamw(model, AdamWSettings())
    model(torch.ones(1, 4)).sum().backward()
    first.step()
    state = {name: value.clone() for name, value in state_tensors(first, model).items()}
    assert set(state) == {f"{p}.{k}" for p in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")}
    second = adamw(model, AdamWSettings())
    load_state_tensors(second, model, state)
    assert all(torch.equal(value, state[name]) for name, value in state_tensors(second, model).items())
    with pytest.raises(KeyError, match=r"bias\.step"):
        load_state_tensors(second, model, {k: v for k, v in state.items() if k != "bias.step"})


@pytest.mark.parametrize(
    "bad", [{"peak": 0.0}, {"peak": float("nan")}, {"floor": 2.0}, {"clip": 0.0}, {"warmup": -1}]
)
def test_refuses_impossible_settings(bad: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="need peak > 0"):
        AdamWSettings(**bad)  # type: ignore[arg-type]
