"""A comparison on the screen."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from fa_research.compare.cells import Cell
from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import decision_map
from fa_research.compare.estimates import Ratio
from fa_research.compare.keys import short, text_of
from fa_research.compare.names import number, quantity
from fa_research.compare.no_verdict import banner, verdict_title
from fa_research.compare.verdicts import Verdict
from fa_research.compare.wording import caveats, excess, outcome, regret_summary, summary
from fa_research.text import plural
from fa_research.tracking import CONSOLE
from fa_research.tracking.screen import show


def print_comparison(comparison: Comparison, *, regret: bool = False) -> None:
    """Cells and verdicts; with `regret` the best single choice and the decision map too."""
    better = "more is better" if comparison.higher else "less is better"
    CONSOLE.print(
        Text(f"{comparison.question.title} by {quantity(comparison.metric)}, {better}", style="bold")
    )
    if said := banner(comparison):
        CONSOLE.print(Text(said, style="bold yellow"), soft_wrap=True)
    show(_cells_table(comparison))
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


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _cells_table(comparison: Comparison) -> Table:
    keys = list(comparison.cells[0].where)
    table = _table(*(short(key, keys) for key in keys), *comparison.labels)
    table.add_column(verdict_title(comparison), overflow="fold")
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
    if len(comparison.cells) < 2 or not found:
        CONSOLE.print(
            Text(f"no regret of one choice everywhere: {regret_summary(comparison)}"), soft_wrap=True
        )
        return
    CONSOLE.print(Text(f"regret of one choice everywhere, over {plural(cells, 'cell')}", style="bold"))
    table = _table(comparison.question.title, "cells", "no number", "geometric mean", "worst")
    table.add_column("worst at", overflow="fold")
    for item in found:
        counts = (str(item.cells), str(item.failed), excess(item.mean), excess(Ratio(item.worst)))
        table.add_row(item.label, *counts, item.worst_cell.title if item.worst > 1 else "")
    show(table)
    CONSOLE.print(Text(regret_summary(comparison)))
    CONSOLE.print()
    _print_map(comparison)


def _print_map(comparison: Comparison) -> None:
    drawn = decision_map(comparison.cells)
    if drawn is None:
        return
    keys = [drawn.x, *drawn.keys]
    CONSOLE.print(Text(f"which wins, along {short(drawn.x, keys)}", style="bold"))
    table = _table(*(short(key, keys) for key in drawn.keys))
    for x in drawn.xs:
        table.add_column(text_of(x), overflow="fold")
    for where, places in drawn.rows:
        numbers = (places.get(x) for x in drawn.xs)
        wins = [_wins(None if n is None else comparison.verdicts[n]) for n in numbers]
        table.add_row(*(text_of(value) for value in where.values()), *wins)
    show(table)


def _wins(verdict: Verdict | None) -> Text:
    if verdict is None or not verdict.best:
        return Text("" if verdict is None else "none", style="dim")
    return Text(" = ".join(verdict.best), style="dim" if verdict.is_tie else "")
