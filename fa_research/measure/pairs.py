"""Two ways of doing one thing, timed in turns: the only comparison that clocks and neighbours cannot tilt.

Each pair runs both, in an order drawn by lot: what drifts (clocks, temperature, other processes) meets both alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from fa_research.measure.bootstrap import FEWEST_SAMPLES, interval, ratio_draws
from fa_research.measure.timing import Timer
from fa_research.workloads.base import no_reset


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
        """Whether neither is faster: the interval holds 1, or an end of it is NaN."""
        return not (self.high < 1.0 or self.low > 1.0)


def time_pairs(
    first: Callable[[], object],
    second: Callable[[], object],
    timer: Timer,
    *,
    pairs: int = 30,
    seed: int = 0,
    reset: Callable[[], object] = no_reset,
    between_resets: int | None = None,
) -> Pairs:
    """Time two callables in `pairs` order-randomised pairs, after `timer.warmup` untimed calls of each.

    reset: puts back what both move on: before the warm-up, and every `between_resets` pairs (None: before the first
    alone). No further pairs once `timer.max_seconds` have gone, five at least.

    Every sample is waited for. On a GPU give callables that launch fast (a graph's replay) and a timer with a cold L2,
    whose flush keeps the device busy during the launch. Raises ValueError for fewer than five pairs.
    """
    reset()
    for _ in range(timer.warmup):
        first()
        second()
    rng = random.Random(seed)
    taken: tuple[list[float], list[float]] = ([], [])
    deadline = time.monotonic() + timer.max_seconds
    for done in range(0, pairs, between_resets or pairs):
        if done >= FEWEST_SAMPLES and time.monotonic() >= deadline:
            break
        reset()
        order = _order(rng, min(between_resets or pairs, pairs - done))
        fewest = max(0, 2 * (FEWEST_SAMPLES - done))
        timing = timer.time_each(((first, second)[turn] for turn in order), fewest=max(2, fewest), together=1)
        for turn, sample in zip(order, timing.samples_us, strict=False):  # fewer samples where time ran out
            taken[turn].append(sample)
        if len(timing.samples_us) < len(order):
            break
    return _whole_pairs(*taken, seed)


def _order(rng: random.Random, pairs: int) -> list[int]:
    """Which of the two runs (0 or 1), call after call."""
    return [turn for _ in range(pairs) for turn in rng.sample([0, 1], 2)]


def _whole_pairs(first_us: list[float], second_us: list[float], seed: int) -> Pairs:
    """What both have samples of, compared."""
    whole = min(len(first_us), len(second_us))
    first_us, second_us = first_us[:whole], second_us[:whole]
    low, high = interval(ratio_draws(first_us, second_us, seed=seed))
    return Pairs(tuple(first_us), tuple(second_us), median(first_us) / median(second_us), low, high)
