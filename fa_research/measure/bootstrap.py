"""How sure a median is, from its samples alone. Numpy only; every draw is seeded, so a result can be had again.

Blocks of neighbouring samples are drawn, not single ones (circular block bootstrap, Politis and Romano 1992): clocks
and caches drift, so neighbours are alike, and drawing them one by one would claim too much certainty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST_SAMPLES = 5  # with fewer, resampling says little of the spread


def median_draws(samples: Sequence[float], *, seed: int | Sequence[int], draws: int = DRAWS) -> Draws:
    """Medians of `draws` resamplings, float64 [draws], in the samples' unit.

    Blocks hold n^(1/3) samples. Raises ValueError for fewer than `FEWEST_SAMPLES` samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    return np.median(values[_resampled(len(values), draws, seed)], axis=1)


def ratio_draws(
    above: Sequence[float], below: Sequence[float], *, seed: int | Sequence[int], draws: int = DRAWS
) -> Draws:
    """Ratios of the medians of samples taken in pairs, float64 [draws]. Pairs are drawn whole, so that what made both
    slow at once cancels. Raises ValueError for fewer than `FEWEST_SAMPLES` pairs."""
    index = _resampled(len(above), draws, seed)
    medians = (np.median(np.asarray(samples, dtype=np.float64)[index], axis=1) for samples in (above, below))
    return np.divide(*medians)


def _resampled(n: int, draws: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Indices [draws, n], in blocks of neighbours."""
    if n < FEWEST_SAMPLES:
        raise ValueError(f"{n} samples: a bootstrap takes at least {FEWEST_SAMPLES}")
    block = max(1, round(n ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, n, size=(draws, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)) % n
    return index.reshape(draws, -1)[:, :n]


def normal_draws(median: float, p10: float, p90: float, count: int, *, seed: int | Sequence[int]) -> Draws:
    """Stand-ins for `median_draws` where only percentiles were kept: a normal of the median's standard error.

    Rough: it takes the samples for independent and normal, 1.2533 sigma / sqrt(count) being a median's error then.
    """
    sigma = (p90 - p10) / 2.5631  # the distance of a normal's deciles, in sigmas
    error = 1.2533 * sigma / max(count, 1) ** 0.5
    drawn = np.random.default_rng(seed).normal(median, error, size=DRAWS)
    return np.maximum(drawn, median * 1e-6)  # a time is positive


def interval(draws: Draws, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central `confidence` of the draws (percentile bootstrap)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
