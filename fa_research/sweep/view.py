"""A sweep on the screen while it runs: a table that fills and bars on a terminal, a line a cell elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fa_research.sweep.cells import Cell
from fa_research.tracking import CONSOLE, Row
from fa_research.tracking.bars import hand_progress_to
from fa_research.tracking.cell_rows import count_rows, rows_of
from fa_research.tracking.columns import DETAIL, format_value
from fa_research.tracking.screen import table_of

log = logging.getLogger(__name__)

_OTHER_LINES = 12  # of the terminal, which the table leaves free
_POLL_S = 0.5


class SweepView:
    """Cells of a sweep as they begin and end, one at a time."""

    def __init__(self, total: int, enabled: bool = True) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self._rows: list[Row] = []
        self._live: Live | None = None
        if enabled and CONSOLE.is_terminal and total:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=CONSOLE,
            )
            self._cells = self._bars.add_task("cells", total=total)
            self._steps = self._bars.add_task("", total=None, visible=False)
            self._live = Live(self._bars, console=CONSOLE, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            hand_progress_to(self._draw_steps)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            hand_progress_to(None)

    def begin(self, cell: Cell) -> None:
        """A cell is about to run."""
        if self._live is None:
            log.info("\t#%d : %s", cell.job, cell.text)
        else:
            self._bars.reset(self._steps, description=f"#{cell.job}", total=None, visible=True)

    def end(self, cell: Cell, row: Row) -> None:
        """A cell has its row."""
        self.done += 1
        self._rows.append(row)
        if self._live is None:
            log.info("\t#%d %s (%s)", cell.job, in_short(row), self._estimate())
            return
        self._bars.update(self._cells, completed=self.done)
        newest = self._rows[-max(1, CONSOLE.height - _OTHER_LINES) :]
        self._live.update(Group(table_of(newest, first=self.done - len(newest)), self._bars))

    def _draw_steps(self, description: str, done: float, total: float | None) -> None:
        if total is None:  # a bar that only moves
            self._bars.reset(self._steps, description=description, total=None)
            return
        self._bars.update(self._steps, description=description, completed=done, total=total)

    def _estimate(self) -> str:
        gone = time.monotonic() - self.started
        left = self._running() / self.done * (self.total - self.done)
        rest = f", about {_duration(left)} left" if self.done < self.total else ""
        return f"{self.done} of {self.total}, {_duration(gone)} gone{rest}"

    def _running(self) -> float:
        """Seconds since the first cell began, which is after the imports of its process."""
        first = min(datetime.fromisoformat(row.started) for row in self._rows)
        return max(0.0, (datetime.now(UTC) - first).total_seconds())


def in_short(row: Row) -> str:
    """Status and why, or the first time of a row."""
    if row.reasons:
        return f"{row.status}: {'; '.join(row.reasons)}"
    metrics = [(name, value) for name, value in row.metrics.items() if not DETAIL.search(name)]
    times = [f" {name}={format_value(value)}" for name, value in metrics if name.endswith("_us")]
    return f"{row.status}{''.join(times[:1])}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def watching(cells: Sequence[Cell], folder_of: Callable[[Cell], Path]) -> Iterator[None]:
    """Says which cells have got their rows while launchers of other processes run them: by looking into their folders,
    since what such a launcher itself says of a job (submitit: that it succeeded) is not about the cell."""
    stop, view = threading.Event(), SweepView(len(cells), enabled=False)
    pending = {cell.job: (cell, count_rows(folder_of(cell))) for cell in cells}

    def look() -> None:
        for cell, before in list(pending.values()):
            if len(rows := rows_of(folder_of(cell))) > before:
                del pending[cell.job]
                view.end(cell, rows[-1])

    def watch() -> None:
        while not stop.wait(_POLL_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    look()
