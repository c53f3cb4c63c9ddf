"""A row's number with what is known of its certainty, and the ratio of two of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import quantiles

import numpy as np

from fa_research.compare.drift import Z95, Drift
from fa_research.compare.keys import near
from fa_research.compare.reading import Record, is_number
from fa_research.compare.trust import is_time, on_cpu
from fa_research.errors import ConfigError
from fa_research.measure.bootstrap import (
    DRAWS,
    FEWEST_SAMPLES,
    Draws,
    interval,
    median_draws,
    normal_draws,
)
from fa_research.tracking import Status

_HIGHER_IS_BETTER = ("_per_s", "_fraction", "_hit_rate")
_RATE = "_tokens_per_s"
MAIN = (
    "decode_step_us",
    "extend_pass_us",
    "mixed_pass_us",
    "attention_us",
    "prefill_us",
    "itl_us",
    "ttft_us",
)


class How(Enum):
    """What an interval rests on."""

    bootstrap = "bootstrap"  # of the samples kept
    rough = "rough"  # of the 10th and 90th percentile
    none = "none"  # nothing was kept

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class Estimate:
    """A median (of several runs the geometric mean of theirs), and how it might have come out.

    Attributes:
        draws: float64 [draws]: within a run (None where no spread was kept, and nothing is known of other runs) and
            from run to run.
        p10, p90: where the samples of the latest run lay.
        run_sd: standard deviation between runs of the log of a median (`drift.py`); 0 for what is no time.
        runs: how many runs `value` is of.
    """

    value: float
    how: How
    draws: Draws | None = None
    p10: float | None = None
    p90: float | None = None
    run_sd: float = 0.0
    runs: int = 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median."""
        return None if self.draws is None else interval(self.draws)

    @property
    def sd(self) -> float:
        """What runs add to the standard deviation of the log of `value`."""
        return self.run_sd / self.runs**0.5


@dataclass(frozen=True)
class Ratio:
    """A quotient and its 95 % interval; None where the spread of either side is not known."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate(record: Record, metric: str) -> Estimate | None:
    """The record's number; None where it has none that is finite and positive."""
    if metric not in record.estimates:
        record.estimates[metric] = pooled([record, *record.replicates], metric)
    found: Estimate | None = record.estimates[metric]
    return found


def pooled(records: Sequence[Record], metric: str) -> Estimate | None:
    """The number of one config from the rows of all its runs, the latest first; None where the latest has none."""
    made = [found for record in records if (found := within_run(record, metric))]
    latest = within_run(records[0], metric)
    if latest is None or not is_time(metric):
        return latest
    kind = kind_of(records[0])
    _pool(records[0].drift, metric)
    run_sd = records[0].drift.sd(kind, metric)
    value = (
        math.exp(sum(math.log(found.value) for found in made) / len(made)) if len(made) > 1 else latest.value
    )
    seed = zlib.crc32(f"between {records[0].hash} {records[0].row.started}".encode())
    noise = np.random.default_rng(seed).normal(0.0, run_sd / len(made) ** 0.5, DRAWS)
    noise = -noise if higher_is_better(metric) else noise  # a slow run has long times and low rates
    logs = [
        np.full(DRAWS, math.log(found.value)) if found.draws is None else np.log(found.draws)
        for found in made
    ]
    draws = np.exp(np.mean(logs, axis=0) + noise)
    return Estimate(value, latest.how, draws, latest.p10, latest.p90, run_sd, len(made))


def kind_of(record: Record) -> str:
    """`gpu` or `cpu`, the kinds of device that `drift.py` knows."""
    return "cpu" if on_cpu(record) else "gpu"


def _pool(drift: Drift, metric: str) -> None:
    """Put the replicates of this metric into the drift's pool, once."""
    if metric in drift.metrics:
        return
    drift.metrics.add(metric)
    for group in drift.groups:
        runs = [found for record in group if (found := within_run(record, metric))]
        if len(runs) > 1:
            values = [found.value if found.draws is None else found.draws for found in runs]
            drift.add(kind_of(group[0]), metric, values)


def within_run(record: Record, metric: str) -> Estimate | None:
    """The number of one row, with what its own samples say of it."""
    value = _positive(record, metric)
    if value is None:
        return None
    time_us = metric
    if metric.endswith(_RATE):
        time_us = metric.removesuffix(_RATE).removesuffix("_computed").removesuffix("_prompt") + "_us"
    if time_us != metric and (time := within_run(record, time_us)) and time.draws is not None:
        scale = value * time.value  # a rate is this over a time
        p10, p90 = (None if other is None else scale / other for other in (time.p90, time.p10))
        return Estimate(value, time.how, scale / time.draws, p10, p90)
    seed = zlib.crc32(f"{record.hash} {record.row.started} {metric}".encode())
    if len(samples := record.samples(metric)) >= FEWEST_SAMPLES:
        deciles = quantiles(samples, n=10, method="inclusive")
        return Estimate(value, How.bootstrap, median_draws(samples, seed=seed), deciles[0], deciles[-1])
    stem = metric.removesuffix("_us")
    low, high, count = (_positive(record, f"{stem}_{name}") for name in ("p10_us", "p90_us", "count"))
    if low is not None and high is not None:
        return Estimate(
            value, How.rough, normal_draws(value, low, high, int(count or 1), seed=seed), low, high
        )
    return Estimate(value, How.none)


def _positive(record: Record, metric: str) -> float | None:
    value = record.row.metrics.get(metric)
    return value if is_number(value) and value > 0 else None


def ratio(above: Estimate, below: Estimate) -> Ratio:
    """`above` over `below`."""
    value = above.value / below.value
    if above.draws is None or below.draws is None:
        return Ratio(value)
    return Ratio(value, *interval(above.draws / below.draws))


def in_turns(record: Record, metric: str) -> Estimate | None:
    """`metric` over that of the reference of `measure.against`, timed in turns in one process, so that the drift
    between runs cancels; None where the row has none."""
    stem = metric.removesuffix("_us")
    value, low, high = (_positive(record, f"{stem}_against_{name}") for name in ("ratio", "low", "high"))
    if value is None or low is None or high is None or not metric.endswith("_us"):
        return None
    seed = zlib.crc32(f"against {record.hash} {record.row.started} {metric}".encode())
    noise = np.random.default_rng(seed).normal(0.0, math.log(high / low) / (2 * Z95), DRAWS)
    return Estimate(value, How.rough, value * np.exp(noise))


def higher_is_better(metric: str) -> bool:
    return metric.endswith(_HIGHER_IS_BETTER)


def choose_metric(wanted: str | None, records: Sequence[Record]) -> tuple[str, list[str]]:
    """The metric to compare, and the others that rows have; the most common time where none is wanted.

    Only numbers that an `Estimate` can be made of count: of rows that are `ok`, finite and above 0. Raises ConfigError
    where no row has one.
    """
    done = [record for record in records if record.row.status is Status.ok]
    count: dict[str, int] = {}
    for record in done:
        for name in record.row.metrics:
            if _positive(record, name) is not None:
                count[name] = count.get(name, 0) + 1
    if not count:
        raise ConfigError(f"none of the {len(records)} rows has a number: {_failures(records)}")
    if wanted is not None and wanted not in count:
        raise ConfigError(f"{_why_not(wanted, records, count)}; there are {', '.join(count)}")
    main = [name for name in count if _is_main(name)] or list(count)
    main.sort(
        key=lambda name: (_is_part(name), -count[name], MAIN.index(name) if name in MAIN else len(MAIN))
    )
    if wanted is None and _is_part(main[0]):
        raise ConfigError(
            f"no row has a whole time above 0, only parts of one; --metric takes one: {', '.join(main)}"
        )
    chosen = wanted or main[0]
    return chosen, [name for name in main if name != chosen]


def _is_part(name: str) -> bool:
    return "_ledger_" in name


def _why_not(wanted: str, records: Sequence[Record], names: Iterable[str]) -> str:
    """Why this metric cannot be compared."""
    having = [record for record in records if wanted in record.row.metrics]
    if not having:
        return f"no row has a metric {wanted}{near(wanted, names)}"
    if not (done := [record for record in having if record.row.status is Status.ok]):
        return f"no row that is ok has a number for {wanted}: {_failures(having)}"
    values = dict.fromkeys(str(record.row.metrics[wanted])[:20] for record in done)
    more = ", ..." if len(values) > 4 else ""
    return f"no row has a number above 0 for {wanted}, which is {', '.join(list(values)[:4])}{more} in {len(done)} rows"


def _is_main(name: str) -> bool:
    aside = name.endswith(("_p10_us", "_p90_us", "_host_us")) or name.startswith("self_test_")
    return name.endswith("_us") and not aside


def _failures(records: Sequence[Record]) -> str:
    count: dict[str, int] = {}
    for record in records:
        reason = f": {record.row.reasons[0]}" if record.row.reasons else ""
        count[f"{record.row.status}{reason}"] = count.get(f"{record.row.status}{reason}", 0) + 1
    return "; ".join(f"{number} {what}" for what, number in list(count.items())[:4])
