"""`measure.against`: the units of two engines in one process, timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from fa_research.errors import ConfigError
from fa_research.measure.pairs import Pairs, time_pairs
from fa_research.measure.timing import Timer
from fa_research.workloads.base import Unit, Workload

PAIRS = 30


def shared_units(first: Workload, second: Workload) -> list[tuple[Unit, Unit]]:
    """The units that both have. Raises ConfigError for none: then there is nothing to compare."""
    others = {unit.name: unit for unit in second.units()}
    shared = [(unit, others[unit.name]) for unit in first.units() if unit.name in others]
    if not shared:
        names = ", ".join(unit.name for unit in first.units())
        raise ConfigError(
            f"measure.against={list(first.config.measure.against)}: times {', '.join(others)}, this cell {names}, "
            "so that there is nothing to compare; give overrides that leave the kind of workload as it is"
        )
    return shared


def time_against(
    first: Workload, second: Workload, timer: Timer, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[float]], list[str]]:
    """Columns, samples in microseconds and what a reader is to know, of every unit that both workloads have.

    `<unit>_against_ratio` is this cell's median over the other's, from pairs in an order drawn by lot; `_low` and
    `_high` are its 95 % interval, `<unit>_against_us` is the other's median.
    """
    columns: dict[str, Any] = {"against": ", ".join(overrides)}
    samples: dict[str, list[float]] = {}
    notes: list[str] = []
    for unit, other in shared_units(first, second):
        pairs = _pairs(unit, other, timer, first.config.seed)
        name = f"{unit.name}_against"
        columns |= {f"{name}_us": median(pairs.second_us), f"{name}_ratio": pairs.ratio}
        columns |= {
            f"{name}_low": pairs.low,
            f"{name}_high": pairs.high,
            f"{name}_pairs": len(pairs.first_us),
        }
        samples[f"{name}_us"] = list(pairs.second_us)
        samples[f"{name}_first_us"] = list(pairs.first_us)
        notes.append(verdict(unit.name, pairs, columns["against"]))
    return columns, samples, notes


def verdict(unit: str, pairs: Pairs, against: str) -> str:
    """The comparison in a sentence; a tie is called a tie."""
    interval = f"{pairs.ratio:.3f} times its time (95 %: {pairs.low:.3f} to {pairs.high:.3f})"
    if pairs.is_tie:
        return f"{unit}: a tie with {against}, {interval}"
    return f"{unit}: {'faster' if pairs.ratio < 1 else 'slower'} than {against}, {interval}"


def _pairs(unit: Unit, other: Unit, timer: Timer, seed: int) -> Pairs:
    def reset() -> None:
        unit.reset()
        other.reset()

    # Decode steps move on: no more between resets than the cache has room for.
    return time_pairs(
        unit.run,
        other.run,
        timer,
        pairs=max(PAIRS, unit.samples),
        seed=seed,
        reset=reset,
        between_resets=max(1, min(unit.samples, other.samples)),
    )
