"""Passes over logits against PyTorch, on every instruction-set level."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels.native import _module, available_levels
from hasten.kernels.reference import vocabulary as reference
from hasten.kernels.vocabulary import all_finite, argmax, sample, truncate

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7]),
    width=st.one_of(st.integers(1, 70), st.just(50_000)),
    values=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**31),
)
def test_argmax_takes_the_lowest_of_equal_ids(
    module: ModuleType, rows: int, width: int, values: int, seed: int
) -> None:
    logits = torch.randint(0, values, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(argmax(logits, module=module), reference.argmax(logits))


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_minus_infinity_and_nan(module: ModuleType, width: int) -> None:
    logits = torch.full((3, width), -INF)
    logits[1, -1] = -1e30
    logits[2] = NAN
    logits[2, width // 2] = -3.0
    assert argmax(logits, module=module).tolist() == [0, width - 1, width // 2]
    assert argmax(torch.full((1, width), NAN), module=module).tolist() == [0]


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 70), at=st.integers(0, 69), value=st.sampled_from([NAN, INF, -INF, 3e38]))
def test_all_finite(module: ModuleType, width: int, at: int, value: float) -> None:
    logits = torch.full((3, width), 3e38)
    logits[1, at % width] = value
    assert all_finite(logits, module=module).tolist() == [True, value == 3e38, True]
    assert torch.equal(all_finite(logits, module=module), reference.all_finite(logits))


def test_wrong_logits_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        argmax(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape"):
        all_finite(torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        argmax(torch.zeros(2, 0))


# Closer to 1 than this, top-p is decided by rounding: what lies between is less than the masses' sum can tell.
SETTINGS = st.tuples(
    st.sampled_from([0.05, 0.7, 1.0, 3.0, 100.0]),
    st.sampled_from([0, 0, 1, 2, 7, 63, 64, 65, 500, 10**6]),
    st.one_of(st.sampled_from([1.0, 1.0, 1e-300, 0.5, 0.9, 0.999]), st.floats(1e-9, 0.9999)),
    st.one_of(st.sampled_from([0.0, 0.0, 0.05, 1.0]), st.floats(0, 1)),
)


def make(width: int, count: int, kind: str, scale: float, seed: int) -> torch.Tensor:
    """Rows of logits: normal, few distinct values, one value, hardly any that is not -inf, or extremes of float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * scale
    if kind == "ties":
        x = (x / scale).round() * scale
    elif kind == "equal":
        x.fill_(scale)
    elif kind == "sparse":
        keep = torch.randint(0, width, (count, 3), generator=generator)
        x = torch.full_like(x, -INF).scatter_(1, keep, x.gather(1, keep))
    elif kind == "extreme":
        x = x.sign() * 3e38
        x[:, 0] = -INF
        x[:, -1] = INF
    return x


def columns(settings_list: list[tuple[float, int, float, float]]) -> tuple[torch.Tensor, ...]:
    temperature, top_k, top_p, min_p = zip(*settings_list, strict=True)
    return (
        torch.tensor(temperature),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float32).log(),
    )


ROWS = {
    "settings_list": st.lists(SETTINGS, min_size=1, max_size=4),
    "width": st.one_of(st.integers(1, 300), st.sampled_from([4096, 5001])),
    "kind": st.sampled_from(["normal", "ties", "equal", "sparse", "extreme"]),
    "scale": st.sampled_from([0.3, 3.0, 30.0]),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=150, deadline=None)
@given(**ROWS)
def test_truncate_equals_the_reference(module, settings_list, width, kind, scale, seed) -> None:
    logits = make(width, len(settings_list), kind, scale, seed).clamp_max(torch.finfo(torch.float32).max)
    _, *cut = columns(settings_list)
    want = logits.clone()
    reference.truncate(want, *cut)
    truncate(logits, *cut, module=module)
    assert torch.equal(logits, want)


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=150, deadline=None)
@given(**ROWS)
def test_sample_equals_the_reference(module, settings_list, width, kind, scale, seed) -> None:
    logits = make(width, len(settings_list), kind, scale, seed)
    stream = torch.randint(-(2**63), 2**63 - 1, (len(logits),), generator=torch.Generator().manual_seed(seed))
    given, before = columns(settings_list), logits.clone()
    found = sample(logits, *given, stream, module=module)
    assert torch.equal(found, reference.sample(logits, *given, stream))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("module", LEVELS)
def test_a_whole_vocabulary_equals_the_reference(module: ModuleType) -> None:
    given = columns(
        [
            (1.0, 0, 1.0, 0.0),
            (1.0, 50, 1.0, 0.0),
            (0.7, 20_000, 0.95, 0.0),
            (1.0, 0, 0.9, 0.0),
            (1.5, 0, 0.999, 0.0),
            (100.0, 0, 0.7, 0.0),
            (1.0, 0, 1.0, 0.05),
            (1.0, 100, 0.9, 0.01),
        ]
    )
    logits = make(49_152, 8, "normal", 3.0, 1)
    for seed in range(4):
        stream = torch.randint(-(2**63), 2**63 - 1, (8,), generator=torch.Generator().manual_seed(seed))
        want = reference.sample(logits, *given, stream)
        assert torch.equal(sample(logits, *given, stream, module=module), want)


@pytest.mark.parametrize("module", LEVELS)
def test_of_equal_logits_top_k_keeps_all_and_top_p_the_first(module: ModuleType) -> None:
    row = torch.tensor([[1.0, 3, 2, 3, 2, 2, -INF, 0]])

    def kept(top_k: int, top_p: float, min_p: float) -> list[int]:
        x = row.clone()
        truncate(x, *columns([(1.0, top_k, top_p, min_p)])[1:], module=module)
        return (x[0] > -INF).nonzero()[:, 0].tolist()

    assert kept(3, 1.0, 0.0) == [1, 2, 3, 4, 5]
    assert kept(0, 0.3, 0.0) == [1]
    assert kept(0, 0.7, 0.0) == [1, 2, 3]
    assert kept(3, 0.7, 0.0) == [1, 2, 3]
    assert kept(0, 0.8, 0.36) == [1, 2, 3, 4]
    assert kept(0, 1.0, 0.36) == [1, 2, 3, 4, 5]
    assert kept(0, 0.8, 0.5) == [1, 3]
    assert kept(0, 1.0, 0.0) == [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("module", LEVELS)
def test_rows_without_a_choice_are_refused(module: ModuleType) -> None:
    given, stream = columns([(1.0, 0, 0.9, 0.0)] * 3), torch.zeros(3, dtype=torch.int64)
    for bad in (NAN, -INF):
        logits = torch.zeros(3, 100)
        logits[1] = bad
        for run in (
            lambda x: sample(x, *given, stream, module=module),
            lambda x: truncate(x, *given[1:], module=module),
        ):
            with pytest.raises(ValueError, match="row 1 of logits_RV"):
                run(logits)
    one_nan = torch.zeros(3, 100)
    one_nan[2, 77] = NAN
    with pytest.raises(ValueError, match="row 2"):
        sample(one_nan, *given, stream, module=module)


def test_no_rows_and_wrong_settings() -> None:
    none = [t[:0] for t in columns([(1.0, 0, 1.0, 0.0)])]
    assert sample(torch.zeros(0, 9), *none, torch.zeros(0, dtype=torch.int64)).tolist() == []
    logits, stream = torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)
    good = dict(
        zip(
            ("temperature_R", "top_k_R", "top_p_R", "log_min_p_R"),
            columns([(1.0, 0, 1.0, 0.0)] * 2),
            strict=True,
        )
    )
    for name, value in [
        ("temperature_R", torch.tensor([1.0, 0.0])),
        ("temperature_R", torch.tensor([1.0, NAN])),
        ("temperature_R", torch.ones(3)),
        ("top_k_R", torch.tensor([0, -1])),
        ("top_p_R", torch.tensor([0.5, 0.0], dtype=torch.float64)),
        ("top_p_R", torch.tensor([0.5, NAN], dtype=torch.float64)),
        ("log_min_p_R", torch.tensor([0.0, 0.5])),
    ]:
        with pytest.raises(ValueError, match=name):
            sample(logits, **{**good, name: value}, stream_R=stream)
    for name in good:
        with pytest.raises(TypeError, match=name):
            sample(logits, **{**good, name: torch.zeros(2, dtype=torch.int16)}, stream_R=stream)
    with pytest.raises(ValueError, match="columns"):
        sample(torch.zeros(2, 0), **good, stream_R=stream)
    with pytest.raises(ValueError, match="contiguous"):
        truncate(torch.zeros(9, 2).T, *list(good.values())[1:])
