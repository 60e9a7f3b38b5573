"""Percentiles and speedups: intervals that cover at the number of rounds that is used."""

import numpy as np
import pytest

from fluxnb.measure import stats


def test_percentiles_of_known_samples():
    assert stats.percentiles([4, 1, 3, 2, 5]) == {
        "min": 1,
        "p25": 2,
        "p50": 3,
        "p90": pytest.approx(4.6),
        "p99": None,
        "avg": 3,
    }


def test_p99_is_empty_below_100_samples():
    assert stats.percentiles(range(1, 100))["p99"] is None
    assert stats.percentiles(range(1, 101))["p99"] == pytest.approx(99.01)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_samples_that_are_no_latencies_are_refused(samples):
    with pytest.raises(ValueError):
        stats.percentiles(samples)


def test_summary_has_the_columns_of_a_result():
    from fluxnb.study.results import COLUMNS

    row = stats.summary([0.2, 0.1])
    assert set(row) <= set(COLUMNS)
    assert row["n"] == 2 and row["samples"] == [0.2, 0.1]
    assert row["latency_p50"] == row["latency_avg"] == pytest.approx(0.15)
    assert row["latency_p99"] is None


def test_speedup_of_constants_is_exact():
    assert stats.speedup([3.0] * 5, [1.5] * 5) == (2.0, 2.0, 2.0)


def test_speedup_is_paired():
    # The candidate takes half the time in every round; only a resample of both alike keeps the ratio at 2.
    baseline = list(np.random.default_rng(1).uniform(1, 10, 12))
    assert stats.speedup(baseline, [b / 2 for b in baseline]) == pytest.approx((2, 2, 2))


def test_speedup_is_the_median_of_the_rounds_ratios():
    ratio, low, high = stats.speedup([2.0, 2.0, 2.0, 2.0, 50.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert ratio == 2.0
    assert low == 2.0 and high == 50.0  # the outlier widens the range and leaves the ratio alone


def test_fewer_than_six_rounds_give_their_range_and_more_an_interval_inside_of_it():
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 9.0]
    assert stats.speedup(ratios[:3], [1.0] * 3) == (1.1, 1.0, 1.2)
    assert stats.speedup(ratios, [1.0] * 10)[1:] == (1.1, 1.8)
    assert stats.coverage(stats.LEAST) >= stats.NOMINAL > stats.coverage(stats.LEAST - 1)


@pytest.mark.parametrize("n, least, most", [(3, 0.72, 0.78), (6, 0.95, 0.985), (10, 0.96, 0.99)])
@pytest.mark.parametrize("kind", ["normal", "skewed", "outliers", "drift"])
def test_coverage_of_the_interval_at_the_numbers_of_rounds_that_are_used(n, least, most, kind):
    """Simulated: three rounds cover 75 %, so they are called a range; six and more hold what is promised."""
    rng, times, true = np.random.default_rng(n), 4000, 2.0
    own, other = rng.lognormal(0, 0.05, (2, times, n))
    if kind == "skewed":
        own, other = 1 + rng.exponential(0.05, (2, times, n))
    if kind == "outliers":
        own, other = (x * np.where(rng.random((times, n)) < 0.1, 1.5, 1) for x in (own, other))
    if kind == "drift":
        drift = np.linspace(1, 1.3, n) * rng.lognormal(0, 0.1, (times, 1))
        own, other = own * drift, other * drift
    ends = [stats.speedup(true * a, b)[1:] for a, b in zip(own, other, strict=True)]
    covered = np.mean([low <= true <= high for low, high in ends])
    assert least <= covered <= most
    assert covered == pytest.approx(stats.coverage(n), abs=0.015)
    assert np.median([high - low for low, high in ends]) < (
        1.2 if kind == "outliers" else 0.6
    )  # and not by being as wide as the world


@pytest.mark.parametrize("baseline, candidate", [([1, 2], [1]), ([1], [1]), ([], []), ([1, 0], [1, 1])])
def test_speedup_refuses_samples_without_pairs(baseline, candidate):
    with pytest.raises(ValueError):
        stats.speedup(baseline, candidate)
