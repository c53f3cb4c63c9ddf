"""Two ways of doing one thing, timed in turns: the only comparison that clocks and neighbours cannot tilt.

Each pair runs both, in an order drawn by lot: what drifts (clocks, temperature, other processes) meets both alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from fa_research.measure.bootstrap import interval, ratio_draws
from fa_research.measure.timing import Timer


@dataclass(frozen=True)
class Pairs:
    """Times of both in microseconds, pair by pair, and the ratio of their medians (first over second) with its 95 %
    interval."""

    first_us: tuple[float, ...]
    second_us: tuple[float, ...]
    ratio: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1.0 <= self.high


def time_pairs(
    first: Callable[[], object], second: Callable[[], object], timer: Timer, *, pairs: int = 30, seed: int = 0
) -> Pairs:
    """Time two callables in `pairs` order-randomised pairs, after `timer.warmup` untimed calls of each.

    Every sample is waited for. On a GPU give callables that launch fast (a graph's replay) and a timer with a cold L2,
    whose flush keeps the device busy during the launch. Raises ValueError for fewer than five pairs.
    """
    once = Timer(timer.device, warmup=0, max_seconds=timer.max_seconds, l2=timer.l2)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(timer.warmup):
        first()
        second()
    rng, order = random.Random(seed), [(first, taken[0]), (second, taken[1])]
    for _ in range(pairs):
        rng.shuffle(order)
        for run, samples in order:
            samples.append(once.time(run, 1).samples_us[0])
    low, high = interval(ratio_draws(*taken, seed=seed))
    return Pairs(tuple(taken[0]), tuple(taken[1]), median(taken[0]) / median(taken[1]), low, high)
