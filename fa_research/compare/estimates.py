"""A row's number with what is known of its certainty, and the ratio of two of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import quantiles

from fa_research.compare.keys import near
from fa_research.compare.reading import Record, is_number
from fa_research.errors import ConfigError
from fa_research.measure.bootstrap import FEWEST_SAMPLES, Draws, interval, median_draws, normal_draws
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
    """A median, how it might have come out (float64 [draws], None: not known), and where the samples lay."""

    value: float
    how: How
    draws: Draws | None = None
    p10: float | None = None
    p90: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median."""
        return None if self.draws is None else interval(self.draws)


@dataclass(frozen=True)
class Ratio:
    """A quotient and its 95 % interval; None where the spread of either side is not known."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate(record: Record, metric: str) -> Estimate | None:
    """The record's number; None where it has none that is finite and positive."""
    if metric not in record.estimates:
        record.estimates[metric] = _estimate(record, metric)
    found: Estimate | None = record.estimates[metric]
    return found


def _estimate(record: Record, metric: str) -> Estimate | None:
    value = _positive(record, metric)
    if value is None:
        return None
    time_us = metric
    if metric.endswith(_RATE):
        time_us = metric.removesuffix(_RATE).removesuffix("_computed").removesuffix("_prompt") + "_us"
    if time_us != metric and (time := estimate(record, time_us)) and time.draws is not None:
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
