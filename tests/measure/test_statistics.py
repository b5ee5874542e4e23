import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import MeasureError
from hasten.measure.statistics import MIN_PAIRS, Stopping, median_interval

RATIOS = [1.9, 2.0, 2.1, 2.05, 1.95, 2.2, 1.8, 2.0, 2.02, 1.99]


def test_agrees_with_scipy():
    ours = median_interval(RATIOS)
    theirs = scipy.stats.bootstrap(
        (RATIOS,), np.median, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.median == np.median(RATIOS)
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_same_seed_same_interval():
    ratios = np.random.default_rng(0).uniform(1, 2, 24).tolist()
    assert median_interval(ratios, seed=1) == median_interval(ratios, seed=1)


def test_interval_covers_the_true_median_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = median_interval(np.exp(rng.normal(np.log(2), 0.1, size=15)).tolist())
        hits += interval.low <= 2 <= interval.high
    assert hits / 300 > 0.90


@given(st.lists(st.floats(1e-3, 1e3), min_size=MIN_PAIRS, max_size=30))
def test_interval_lies_inside_the_data_and_around_the_median(ratios):
    interval = median_interval(ratios)
    slack = 1e-9 * max(ratios)
    assert min(ratios) - slack <= interval.low <= interval.median + slack
    assert interval.median - slack <= interval.high <= max(ratios) + slack
    assert interval.pairs == len(ratios)


@pytest.mark.parametrize("count", [0, 1, MIN_PAIRS - 1])
def test_too_few_pairs_are_refused(count):
    with pytest.raises(MeasureError, match=f"{count} pairs are too few"):
        median_interval([1.0] * count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_impossible_ratios_are_refused(bad):
    with pytest.raises(MeasureError, match="positive, finite"):
        median_interval([1.0] * 6 + [bad])


def test_stops_when_narrow():
    stopping = Stopping(max_pairs=100, half_width=0.05)
    assert not stopping.done([2.0] * (MIN_PAIRS - 1), 0)
    assert stopping.done([2.0] * MIN_PAIRS, 0)
    wide = [1.0, 3.0] * 5
    assert not stopping.done(wide, 1e9)
    assert stopping.done(wide * 10, 0)
    assert Stopping(seconds=5, half_width=0).done(wide, 6)
    assert not Stopping(seconds=5, half_width=0).done(wide, 4)


def test_fixed_number_of_pairs():
    stopping = Stopping.fixed(8)
    assert not stopping.done([2.0] * 7, 1e9)
    assert stopping.done([2.0] * 8, 0)


@pytest.mark.parametrize(
    "settings", [{"min_pairs": 5}, {"max_pairs": 2}, {"half_width": math.nan}, {"seconds": 0}]
)
def test_impossible_stopping_rules_are_refused(settings):
    with pytest.raises(MeasureError):
        Stopping(**settings)
