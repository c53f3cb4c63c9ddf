"""Which answer wins a cell, by how much, and how far one choice for all cells is from the best of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fa_research.compare.cells import Cell
from fa_research.compare.drift import spread_of
from fa_research.compare.estimates import Estimate, Ratio, ratio
from fa_research.measure.bootstrap import Draws, interval


@dataclass(frozen=True)
class Verdict:
    """The outcome of one cell.

    Attributes:
        best: the answers that no other beats: one is a win, several a tie; the best median comes first.
        costs: each measured answer's cost against the best median, 1 and more. 1.02: takes 2 % longer, or does 2 % less
            where more is better.
        unjudged: why no answer wins and none ties, though there are numbers; `best` and `costs` are empty then.
        drift: of each cost, the fraction below which two runs of one config may differ (0: timed in turns).
    """

    best: tuple[str, ...]
    costs: dict[str, Ratio]
    unjudged: str = ""
    drift: dict[str, float] = field(default_factory=dict)

    @property
    def is_tie(self) -> bool:
        return len(self.best) > 1

    @property
    def runner_up(self) -> str | None:
        """The best of those that are beaten."""
        beaten = [label for label in self.costs if label not in self.best]
        return min(beaten, key=lambda label: self.costs[label].value, default=None)


def judge(cell: Cell, *, higher: bool, tie: float) -> Verdict:
    """An answer is beaten if its cost is above the best by more than `tie` (a fraction) and than the drift between
    runs, and its 95 % interval, where there is one, lies above 1. Answers that `measure.against` timed in turns with
    one reference are judged by their ratios to it, which are free of that drift."""
    if cell.unjudged and cell.measured:
        return Verdict((), {}, cell.unjudged)
    numbers = cell.in_turns or cell.measured
    if not numbers:
        return Verdict((), {})
    order = sorted(numbers, key=lambda label: numbers[label].value, reverse=higher)
    first = _best(numbers, higher)
    costs = {label: _cost(numbers[label], numbers[first], higher) for label in order}
    costs[first] = Ratio(1.0, 1.0, 1.0)
    drift = {label: spread_of(numbers[label].sd, numbers[first].sd) for label in order}
    best = [first] + [label for label in order[1:] if not _is_beaten(costs[label], max(tie, drift[label]))]
    return Verdict(tuple(best), costs, drift=drift)


def _cost(number: Estimate, best: Estimate, higher: bool) -> Ratio:
    return ratio(best, number) if higher else ratio(number, best)


def _best(numbers: Mapping[str, Estimate], higher: bool) -> str:
    return (max if higher else min)(numbers, key=lambda label: numbers[label].value)


def _against_best(cell: Cell, label: str, higher: bool) -> float:
    best, mine = cell.measured[_best(cell.measured, higher)].value, cell.measured[label].value
    return best / mine if higher else mine / best


def _is_beaten(cost: Ratio, tie: float) -> bool:
    return cost.value > 1 + tie and (cost.low is None or cost.low > 1)


@dataclass(frozen=True)
class Regret:
    """What it costs to take one answer everywhere instead of the best of each cell.

    Attributes:
        cells: in how many it was measured.
        failed: in how many others it has a row without a number.
        mean: geometric mean of its cost against each cell's best median, with its 95 % interval.
        worst: the highest cost, and the cell of it.
    """

    label: str
    cells: int
    failed: int
    mean: Ratio
    worst: float
    worst_cell: Cell


def regrets(cells: Sequence[Cell], labels: Sequence[str], *, higher: bool) -> tuple[list[Regret], int]:
    """The regret of every answer, least first, and of how many cells: those that have a row for each answer that has a
    number anywhere. Answers that run in all of them come before those that do not."""
    cells = [cell for cell in cells if not cell.unjudged]
    able = {label for cell in cells for label in cell.measured}
    complete = [cell for cell in cells if able <= set(cell.entries) and cell.measured]
    found = []
    for label in labels:
        mine = [cell for cell in complete if label in cell.measured]
        if not mine:
            continue
        costs = [_against_best(cell, label, higher) for cell in mine]
        worst = int(np.argmax(costs))
        mean = Ratio(float(np.exp(np.mean(np.log(costs)))), *_mean_interval(mine, label, higher))
        found.append(Regret(label, len(mine), len(complete) - len(mine), mean, costs[worst], mine[worst]))
    return sorted(found, key=lambda regret: (regret.failed, regret.mean.value)), len(complete)


def _mean_interval(cells: Sequence[Cell], label: str, higher: bool) -> tuple[float, float] | tuple[()]:
    """Interval of the geometric mean; () where some row kept no spread. Every draw is judged by the answer that has the
    best median, not by its own best: the best of several draws is always better than any answer is."""
    logs: list[Draws] = []
    for cell in cells:
        numbers = cell.measured
        best = numbers[_best(numbers, higher)].draws
        mine = numbers[label].draws
        if best is None or mine is None:
            return ()
        logs.append(np.log(best / mine if higher else mine / best))
    low, high = np.exp(interval(np.mean(logs, axis=0)))
    return float(low), float(high)
