"""What the user sees: one console for log lines, progress and tables, so that they never tear each other.

In a pipe or a file there are no carriage returns, no colours and no wrapped log lines.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fa_research.streams import complain, drop, open_closed_streams
from fa_research.text import in_seconds
from fa_research.tracking.columns import (
    ASIDE,
    DETAIL,
    families,
    flat,
    format_value,
    ledgers,
    main_metrics,
    varying_keys,
)
from fa_research.tracking.records import Row, Status

_PIPE_WIDTH = 160  # columns of a table that no terminal limits
_OURS = ("fa_research", "hydra", "HYDRA", "__main__")  # whose log lines are all on the screen
_STYLES = {Status.ok: "green", Status.unsupported: "dim", Status.suspect: "yellow"}


class _Screen(Console):
    """A console whose readers may go, as in `| head`: rows are what counts, so the work goes on without them.
    `tells_lost_reader`: whether stderr is told so."""

    tells_lost_reader = True

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            lose(error)
            self.quiet = True

    def on_broken_pipe(self) -> None:
        lose(BrokenPipeError())
        self.quiet = True


class _PipeHandler(logging.StreamHandler[TextIO]):
    """Log lines where there is no terminal, dropped once nobody reads them any more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if isinstance(error := sys.exc_info()[1], OSError):
            lose(error)
        else:
            super().handleError(record)


def lose(error: OSError) -> None:
    """Go on where stdout takes no more, and say so on stderr: its reader has gone, or its disk is full."""
    drop(sys.stdout)
    if not isinstance(error, BrokenPipeError):
        complain(f"cannot write to stdout: {error.strerror}; going on without")
    elif CONSOLE.tells_lost_reader:
        complain("nobody reads stdout any more; going on without the screen, as rows are what counts")


def _console() -> _Screen:
    open_closed_streams()
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return _Screen(width=width, highlight=False)


CONSOLE = _console()


def log_handler() -> logging.Handler:
    """The console's log handler, named in configs/hydra/job_logging. What others say below a warning (JAX: that there
    is no TPU) is in the log of the cell alone."""
    handler = _ConsoleHandler() if CONSOLE.is_terminal else _PipeHandler(sys.stdout)
    handler.addFilter(lambda record: record.levelno > logging.INFO or record.name.startswith(_OURS))
    return handler


class _ConsoleHandler(logging.Handler):
    """Log lines above a progress bar, each as long as it is: a path in two pieces cannot be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        style = (
            "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno > logging.INFO else ""
        )
        try:
            CONSOLE.print(Text(self.format(record), style=style), soft_wrap=True)
        except Exception:
            self.handleError(record)


def print_table(rows: Sequence[Row], metrics: Sequence[str] | None = None, max_metrics: int = 8) -> None:
    """Print one row as a list of its main metrics, several as a table of what varies between their configs.

    Args:
        metrics: names of the columns; None takes the first `max_metrics` of the main ones.
    """
    if not rows:
        CONSOLE.print("no rows")
    elif len(rows) == 1:
        _print_one(rows[0])
    else:
        main = main_metrics(rows)
        columns = [name for name in main if not DETAIL.search(name)]
        table, shown = _fitting(rows, metrics or columns[:max_metrics])
        show(table)
        if more := [name for name in main if name not in shown]:
            CONSOLE.print(Text(f"also in the rows: {families(more)}"))
        said: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            for line in [*row.reasons, *row.notes]:
                said.setdefault(f"{row.status}: {line}", []).append(number)
        for line, numbers in said.items():
            CONSOLE.print(Text(f"{_spans(numbers)} {line}"))


def table_of(rows: Sequence[Row], first: int = 0, max_metrics: int = 4) -> Table:
    """Rows as a table with their first main metrics, numbered from `first`; as `print_table` prints several."""
    return _fitting(rows, main_metrics(rows)[:max_metrics], first)[0]


def _spans(numbers: Sequence[int]) -> str:
    """Rising numbers in short: #0-2 #5."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(numbers) - 1]
    pairs = [(numbers[a], numbers[b]) for a, b in zip(starts, ends, strict=True)]
    return " ".join(f"#{first}" if first == last else f"#{first}-{last}" for first, last in pairs)


def _print_one(row: Row) -> None:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    numbers = row.metrics | ledgers(row.metrics) | (flat({"check": row.checks}) if row.checks else {})
    for name, value in numbers.items():
        if not ASIDE.search(name):
            table.add_row(name, Text(format_value(value)))
    for line in row.notes:
        table.add_row("note", Text(line))
    CONSOLE.print(Text(headline(row), style=_STYLES.get(row.status, "red")), soft_wrap=True)
    for line in row.reasons[1:]:
        CONSOLE.print(Text(line), soft_wrap=True)
    if table.row_count:
        show(table)
    if more := [name for name in numbers if ASIDE.search(name) and "_ledger_" not in name]:
        CONSOLE.print(Text(f"also in the row: {families(more)}"))


def headline(row: Row) -> str:
    """A row in one line: its status, and why or its first two numbers in the units of a reader."""
    if row.reasons:
        return f"{row.status}: {row.reasons[0]}"
    times = [name for name in row.metrics if name.endswith("_us") and not ASIDE.search(name)]
    rates = {name: _rate(row.metrics, name[:-3]) for name in times}
    said = [
        f"{name[:-3].replace('_', ' ')} {in_seconds(row.metrics[name])}{rates[name]}"
        for name in [name for name in times if rates[name]] or times
    ]
    rate = _rate(row.metrics, "decode")
    if "ttft_us" in times and rate:  # of a text that was written, the tokens a second and not the gap
        said[1:] = [f"decode {rate.strip(' ()')}"]
    said = said[:2]
    return f"{row.status}: {', '.join(said)}" if said else str(row.status)


def _rate(metrics: dict[str, Any], unit: str) -> str:
    """The tokens a second of a unit, in brackets; of a prefill those that were computed."""
    for kind in ("", "computed "):
        if rate := metrics.get(f"{unit}_{kind.replace(' ', '_')}tokens_per_s"):
            return f" ({format_value(rate)} {kind}tokens/s)"
    return ""


def show(table: Table) -> None:
    """Print a table, in a pipe without the spaces that fill its lines."""
    if CONSOLE.is_terminal:
        CONSOLE.print(table)
        return
    with CONSOLE.capture() as captured:
        CONSOLE.print(table)
    lines = captured.get().splitlines()
    CONSOLE.print(Text("\n".join(line.rstrip() for line in lines)), soft_wrap=True)


def _fitting(rows: Sequence[Row], metrics: Sequence[str], first: int = 0) -> tuple[Table, list[str]]:
    """The table with as many metrics as the console has room for, one at least, and their names.

    Where they do not all fit, names are broken into lines before metrics are left out.
    """
    shown = list(metrics)
    table = _table(rows, shown, first=first)
    if not _fits(table):
        table = _table(rows, shown, break_names=True, first=first)
    while len(shown) > 1 and not _fits(table):
        shown.pop()
        table = _table(rows, shown, break_names=True, first=first)
    return table, shown


def _fits(table: Table) -> bool:
    return CONSOLE.measure(table).maximum < CONSOLE.width  # rich measures no more than the console's width


def _table(rows: Sequence[Row], metrics: Sequence[str], break_names: bool = False, first: int = 0) -> Table:
    configs = [flat(row.config) for row in rows]
    columns = {"#": [Text(str(first + number)) for number in range(len(rows))]}
    for key in varying_keys([row.config for row in rows]):
        columns[key] = [Text(format_value(config.get(key, ""))) for config in configs]
    columns["status"] = [Text(str(row.status), style=_STYLES.get(row.status, "red")) for row in rows]
    keys = len(columns)
    for name in metrics:
        columns[name] = [Text(format_value(row.metrics.get(name, ""))) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=break_names, pad_edge=not break_names)
    for number, (name, cells) in enumerate(columns.items()):
        header = _broken(name, max(8, *(len(cell) for cell in cells))) if break_names else name
        if number < keys - 1:
            table.add_column(header, overflow="fold")
        else:  # a number in two pieces is misread
            table.add_column(header, no_wrap=True, justify="left" if name == "status" else "right")
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _broken(name: str, width: int) -> str:
    """A long name in lines of about `width`, each but the last ending with a dot or an underscore."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]|[^._]+", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
