"""The bootstrap against what theory says of medians."""

from __future__ import annotations

import numpy as np
import pytest

from fa_research.measure.bootstrap import interval, median_draws, normal_draws, ratio_draws


def test_equal_samples_leave_no_doubt() -> None:
    assert interval(median_draws([3.0] * 10, seed=0)) == (3.0, 3.0)


def test_draws_can_be_had_again_and_differ_by_seed() -> None:
    samples = np.random.default_rng(0).normal(10, 1, 40)
    assert np.array_equal(median_draws(samples, seed=1), median_draws(samples, seed=1))
    assert not np.array_equal(median_draws(samples, seed=1), median_draws(samples, seed=2))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        median_draws([1.0, 2.0, 3.0, 4.0], seed=0)


def test_the_spread_is_that_of_a_median_of_normal_samples() -> None:
    # The standard error of the median of n normal samples is sqrt(pi / 2) / sqrt(n); averaged over 40 sets.
    rng, n = np.random.default_rng(0), 200
    errors = [median_draws(rng.normal(10, 1, n), seed=seed).std() for seed in range(40)]
    assert np.mean(errors) == pytest.approx((np.pi / 2 / n) ** 0.5, rel=0.1)


def test_intervals_hold_the_true_median_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        low, high = interval(median_draws(rng.exponential(1.0, 40), seed=seed, draws=500))
        held += low <= np.log(2) <= high
    assert 0.90 <= held / 300 <= 0.99


def test_drifting_samples_are_trusted_less_than_shuffled_ones() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = [], []
    for seed in range(20):
        walk = [0.0]
        for step in rng.normal(0, 1, 127):
            walk.append(0.8 * walk[-1] + step)
        samples = np.asarray(walk) + 100
        wide.append(median_draws(samples, seed=seed).std())
        narrow.append(median_draws(rng.permutation(samples), seed=seed).std())
    assert np.mean(wide) > 1.3 * np.mean(narrow)


def test_percentiles_give_about_the_interval_of_the_samples_they_are_of() -> None:
    samples = np.random.default_rng(0).normal(100, 2, 400)
    p10, p90 = np.quantile(samples, [0.1, 0.9])
    rough = normal_draws(float(np.median(samples)), p10, p90, 400, seed=0)
    assert rough.std() == pytest.approx(2 * (np.pi / 2 / 400) ** 0.5, rel=0.15)


def test_what_slows_both_of_a_pair_cancels() -> None:
    rng = np.random.default_rng(0)
    drift = 1 + 0.2 * rng.random(60)
    above, below = 1.05 * drift * rng.normal(1, 0.001, 60), drift * rng.normal(1, 0.001, 60)
    low, high = interval(ratio_draws(above, below, seed=0))
    assert low < 1.05 < high
    alone = median_draws(above, seed=1) / median_draws(below, seed=2)
    assert high - low < 0.2 * np.subtract(*interval(alone)[::-1])
