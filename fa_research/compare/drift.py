"""How much a time differs from one run to the next: the variance that the samples within a run do not show.

The model is the one-way random-effects model (Searle, Casella and McCulloch, Variance Components, 1992, chapter 3): the
log of a run's median is that of the config, plus a deviation of the run with variance tau^2, plus the error of the
median within the run. Of configs that were run several times, tau^2 is estimated by analysis of variance, pooled over
configs. Few replicates say little of a variance, so the estimate is moderated by a documented prior as in Smyth, Linear
models and empirical Bayes methods (2004): tau^2 = (d0 tau0^2 + d s^2) / (d0 + d), d being degrees of freedom.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fa_research.measure.bootstrap import Draws

_DATA = Path(__file__).with_name("drift.json")
_PRIOR_FREEDOM = 10  # as much as eleven runs of one config
Z95 = 1.959964  # of a normal, 95 % two-sided


@cache
def _published() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_DATA.read_text(encoding="utf-8"))
    return found


@dataclass
class Drift:
    """Between-run variance of the rows of one call of `load`, by kind of device.

    Attributes:
        groups: the records of each config that was run more than once.
        runs: for each kind (`gpu`, `cpu`), metric and config with replicates, the draws of the median of every run.
        metrics: the metrics whose replicates are in `runs`.
    """

    groups: list[list[Any]] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    runs: dict[tuple[str, str], list[Sequence[Draws | float]]] = field(default_factory=dict)

    def add(self, kind: str, metric: str, runs: Sequence[Draws | float]) -> None:
        """Take the runs of one config into the pool: draws of each median, or the median where no spread was kept."""
        self.runs.setdefault((kind, metric), []).append(runs)

    def freedom(self, kind: str, metric: str) -> int:
        """Degrees of freedom that replicates give: runs less configs."""
        return sum(len(runs) - 1 for runs in self.runs.get((kind, metric), ()))

    def sd(self, kind: str, metric: str) -> float:
        """Tau: the standard deviation between runs of the log of a median, without a unit (0.01 is about 1 %)."""
        prior = float(_published()[kind]["log_sd"])
        configs = self.runs.get((kind, metric), [])
        freedom = self.freedom(kind, metric)
        if not freedom:
            return prior
        within = 0.0
        between = 0.0
        for runs in configs:
            logs = [np.log(run) for run in runs]
            centers = [float(np.median(log)) for log in logs]
            between += sum((center - sum(centers) / len(centers)) ** 2 for center in centers)
            within += (len(runs) - 1) / len(runs) * sum(float(np.var(log)) for log in logs)
        measured = max(0.0, between - within) / freedom
        return math.sqrt((_PRIOR_FREEDOM * prior**2 + freedom * measured) / (_PRIOR_FREEDOM + freedom))

    def source(self, kind: str, metric: str) -> str:
        """Where `sd` is from, in words."""
        freedom = self.freedom(kind, metric)
        told = str(_published()[kind]["source"])
        if not freedom:
            return told
        configs = len(self.runs[kind, metric])
        return f"{configs + freedom} runs of {configs} repeated configs, moderated by {told}"


def spread_of(*sds: float) -> float:
    """The fraction within which, with 95 %, the ratio of numbers with these between-run standard deviations stays."""
    return math.expm1(Z95 * math.sqrt(sum(sd * sd for sd in sds)))
