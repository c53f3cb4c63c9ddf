"""A comparison as CSV and Markdown: every number names the row that it is of."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import Ratio
from fa_research.compare.keys import short, text_of
from fa_research.compare.names import number, quantity
from fa_research.compare.wording import caveats, excess, outcome, regret_summary, summary


def write_csv(comparison: Comparison, folder: Path) -> list[Path]:
    """cells.csv (a line for each row of each cell), and regret.csv where choices are ranked."""
    cells = folder / "cells.csv"
    keys = list(comparison.cells[0].where)
    head = [*keys, comparison.question.title, "status", comparison.metric, "low", "high", "interval"]
    head += ["cost", "cost_low", "cost_high", "best", "not_judged", "config_hash", "row"]
    lines = []
    for cell, verdict in zip(comparison.cells, comparison.verdicts, strict=True):
        for label, entry in cell.entries.items():
            line: list[Any] = [*cell.where.values(), label, entry.status]
            if entry.estimate is None:
                line += [None] * 7 + [False]
            else:
                cost = verdict.costs.get(label)
                line += [entry.estimate.value, *(entry.estimate.interval or (None, None)), entry.estimate.how]
                line += [None] * 3 if cost is None else [cost.value, cost.low, cost.high]
                line += [None if verdict.unjudged else label in verdict.best]
            lines.append([*line, verdict.unjudged, entry.record.hash, entry.record.place])
    _write(cells, head, lines)
    regret = folder / "regret.csv"
    found, _ = comparison.regrets
    if not found:
        return [cells]
    _write(
        regret,
        [comparison.question.title, "cells", "failed", "mean", "mean_low", "mean_high", "worst", "worst_at"],
        [
            [r.label, r.cells, r.failed, r.mean.value, r.mean.low, r.mean.high, r.worst, r.worst_cell.title]
            for r in found
        ],
    )
    return [cells, regret]


def _write(path: Path, head: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(lines)


def write_markdown(comparison: Comparison, folder: Path, figures: Sequence[tuple[str, str]] = ()) -> Path:
    """report.md: verdicts, regret, the rows. `figures` are titles and file names beside it."""
    path = folder / "report.md"
    path.write_text("\n".join(_markdown(comparison, figures)) + "\n", encoding="utf-8")
    return path


def _markdown(comparison: Comparison, figures: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"# {comparison.question.title} by {quantity(comparison.metric)}", ""]
    lines += [f"- {line}" for line in summary(comparison)]
    lines += ["", *cells_table(comparison), ""]
    for title, name in figures:
        lines += [f"![{title}]({name})", ""]
    lines += ["## One choice everywhere", "", regret_summary(comparison), ""]
    if len(comparison.cells) > 1 and comparison.regrets[0]:
        lines += [*_table(*_regret(comparison)), ""]
    lines += ["## Notes", "", *(f"- {line}" for line in [*caveats(comparison), *comparison.notes])]
    lines += ["", "## Rows", "", *_table(*_rows(comparison))]
    return lines


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, lines)]


def cells_table(comparison: Comparison) -> list[str]:
    """Lines of a Markdown table: every cell with its numbers and its verdict."""
    return _table(*_cells(comparison))


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    keys = list(comparison.cells[0].where)
    head = [*(short(key, keys) for key in keys), *comparison.labels, "best, and how the next compares"]
    lines = []
    for cell, verdict in zip(comparison.cells, comparison.verdicts, strict=True):
        line = [text_of(value) for value in cell.where.values()]
        for label in comparison.labels:
            entry = cell.entries.get(label)
            if entry is None:
                line.append("-")
            else:
                text = entry.status if entry.estimate is None else number(entry.estimate.value)
                text = f"**{text}**" if label in verdict.best else text
                line.append(f"[{text}](#row-{comparison.number_of(entry.record)})")
        lines.append([*line, outcome(comparison, cell, verdict)])
    return head, lines


def _regret(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    found, _ = comparison.regrets
    head = [comparison.question.title, "cells", "no number", "geometric mean", "worst", "worst at"]
    return head, [
        [
            *(r.label, str(r.cells), str(r.failed), excess(r.mean), excess(Ratio(r.worst))),
            r.worst_cell.title if r.worst > 1 else "",
        ]
        for r in found
    ]


def _rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    lines = []
    for number_, record in enumerate(comparison.records):
        said = "; ".join([*record.row.reasons, *record.row.notes])
        anchor = f'<a id="row-{number_}"></a>{number_}'
        lines.append([anchor, str(record.row.status), f"`{record.hash}`", f"`{record.place}`", said])
    return ["row", "status", "config hash", "file and line", "reasons and notes"], lines
