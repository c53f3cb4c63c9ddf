"""A comparison on the screen."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from fa_research.compare.cells import Cell
from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import DecisionMap, decision_maps
from fa_research.compare.estimates import Ratio
from fa_research.compare.keys import short, text_of
from fa_research.compare.verdicts import Verdict
from fa_research.compare.wording import (
    caveats,
    excess,
    number,
    outcome,
    quantity,
    regret_summary,
    summary,
)
from fa_research.tracking import CONSOLE

_MOST_MAPS = 12


def print_comparison(comparison: Comparison, *, regret: bool = False) -> None:
    """Cells and verdicts; with `regret` the best single choice and the decision map too."""
    better = "more is better" if comparison.higher else "less is better"
    CONSOLE.print(
        Text(f"{comparison.question.title} by {quantity(comparison.metric)}, {better}", style="bold")
    )
    CONSOLE.print(_cells_table(comparison))
    for line in summary(comparison):
        CONSOLE.print(Text(line))
    if regret:
        CONSOLE.print()
        _print_regret(comparison)
    CONSOLE.print()
    for line in [*caveats(comparison), *comparison.notes]:
        CONSOLE.print(Text(f"note: {line}", style="dim"), soft_wrap=True)
    if comparison.other_metrics:
        CONSOLE.print(
            Text(f"other times in the rows (--metric): {', '.join(comparison.other_metrics)}", style="dim")
        )


def _table(*columns: str, numbers: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    return table


def _cells_table(comparison: Comparison) -> Table:
    keys = list(comparison.cells[0].where)
    table = _table(*(short(key, keys) for key in keys), *comparison.labels)
    table.add_column("best, and how the next compares", overflow="fold")
    for cell, verdict in zip(comparison.cells, comparison.verdicts, strict=True):
        values = [_value(cell, label, verdict) for label in comparison.labels]
        where = [text_of(value) for value in cell.where.values()]
        table.add_row(*where, *values, Text(outcome(comparison, cell, verdict)))
    return table


def _value(cell: Cell, label: str, verdict: Verdict) -> Text:
    entry = cell.entries.get(label)
    if entry is None:
        return Text("-", style="dim")
    if entry.estimate is None:
        return Text(entry.status, style="yellow")
    style = "green" if label in verdict.best else ""
    return Text(number(entry.estimate.value), style=f"bold {style}" if verdict.best == (label,) else style)


def _print_regret(comparison: Comparison) -> None:
    found, cells = comparison.regrets
    CONSOLE.print(Text(f"regret of one choice everywhere, over {cells} cells", style="bold"))
    table = _table(comparison.question.title, "cells", "no number", "geometric mean", "worst")
    table.add_column("worst at", overflow="fold")
    for item in found:
        counts = (str(item.cells), str(item.failed), excess(item.mean), excess(Ratio(item.worst)))
        table.add_row(item.label, *counts, item.worst_cell.title if item.worst > 1 else "")
    CONSOLE.print(table)
    CONSOLE.print(Text(regret_summary(comparison)))
    CONSOLE.print()
    maps = decision_maps(comparison.cells, comparison.verdicts)
    for drawn in maps[:_MOST_MAPS]:
        _print_map(drawn, list(comparison.cells[0].where))
    if len(maps) > _MOST_MAPS:
        CONSOLE.print(Text(f"{len(maps) - _MOST_MAPS} more maps are in the report (--out)"))


def _print_map(drawn: DecisionMap, keys: list[str]) -> None:
    CONSOLE.print(Text(f"which wins{f' at {drawn.title}' if drawn.title else ''}", style="bold"))
    corner = f"{short(drawn.y, keys)} \\ {short(drawn.x, keys)}" if drawn.y else short(drawn.x, keys)
    table = _table(corner, *(text_of(x) for x in drawn.xs), numbers=False)
    for y in drawn.ys:
        places = [drawn.places.get((y, x), []) for x in drawn.xs]
        table.add_row(text_of(y) if drawn.y else "", *(_winners(place) for place in places))
    CONSOLE.print(table)


def _winners(place: list[tuple[Cell, Verdict]]) -> Text:
    texts = [" = ".join(verdict.best) or "none" for _, verdict in place]
    tied = any(verdict.is_tie for _, verdict in place)
    return Text(", ".join(texts) or "-", style="dim" if tied or not texts else "")
