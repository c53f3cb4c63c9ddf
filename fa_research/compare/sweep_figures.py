"""Which figures a sweep gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure
from fa_research.compare.figures.costs import cost_figure, regret_figure
from fa_research.compare.figures.economics import trace_figures
from fa_research.compare.figures.ledger import ledger_figures
from fa_research.compare.figures.lines import latency_figure
from fa_research.compare.figures.page_size import page_size_figure
from fa_research.compare.figures.pareto import pareto_figure
from fa_research.compare.figures.roofline import roofline_figures
from fa_research.compare.figures.wins import decision_figure
from fa_research.compare.overview import Part, Sweep

Section = tuple[Comparison | None, list[Figure]]  # None: figures of all rows of the part


def sections(sweep: Sweep) -> list[list[Section]]:
    """For each part of the sweep: the figures of all of its rows, then those of each choice. Names are files' names."""
    taken: set[str] = set()
    made = []
    for part in sweep.parts:
        found: list[Section] = [(None, [_named(f, "", taken) for f in _common(part)])]
        for comparison in part.asked:
            ending = f"_{comparison.question.title.rpartition('.')[2]}"
            found.append((comparison, [_named(f, ending, taken) for f in _of_choice(comparison)]))
        made.append(found)
    return made


def _named(figure: Figure, ending: str, taken: set[str]) -> Figure:
    """The figure with a name of its own."""
    name, count = f"{figure.name}{ending}", 2
    while name in taken:
        name, count = f"{figure.name}{ending}_{count}", count + 1
    taken.add(name)
    return dataclasses.replace(figure, name=name)


def _common(part: Part) -> Iterator[Figure]:
    if part.lines is None:
        return
    if latency := latency_figure(part.lines):
        yield latency
    yield from roofline_figures(part.lines)
    yield from ledger_figures(part.lines)
    yield from trace_figures(part.lines)
    if part.asked and (pages := page_size_figure(part.lines)):
        yield pages


def _of_choice(comparison: Comparison) -> Iterator[Figure]:
    """Who wins where, and at what cost; costs cell by cell only where there is no map of them. Of answers that change
    the result, quality against time."""
    if pareto := pareto_figure(comparison):
        yield pareto
    if drawn := decision_figure(comparison):
        yield drawn
    elif costs := cost_figure(comparison):
        yield costs
    if regret := regret_figure(comparison):
        yield regret
