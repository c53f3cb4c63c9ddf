"""Progress of one thing: a bar on a terminal, now and then a log line elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from fa_research.tracking.screen import CONSOLE

log = logging.getLogger(__name__)

Draw = Callable[[str, float, float | None], None]  # what is going on, steps done, all steps (None: not known)
# Who draws the progress of a cell while a sweep is on the screen.
cell_progress: Draw | None = None


def hand_progress_to(draw: Draw | None) -> None:
    """From now on `draw` shows the progress of cells; with None they do it themselves."""
    global cell_progress
    cell_progress = draw


@contextmanager
def stages(enabled: bool = True, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show which stage is under way; yields a function that is told the name of each stage as it begins.

    A spinner on a terminal; in a pipe a log line for each stage, where `quiet` at most one every ten seconds; nothing
    where `enabled` is false. In a sweep the stages of a cell are drawn by who shows the sweep.
    """
    if not enabled:
        yield _ignore_name
    elif cell_progress is not None:
        draw = cell_progress
        yield lambda name: draw(name, 0, None)
    elif CONSOLE.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=CONSOLE, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda name: bar.reset(task, description=name)
    else:
        yield _LoggedStages(10.0 if quiet else 0.0)


class _LoggedStages:
    """Stages as log lines, none sooner than `seconds` after the one before."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self, name: str) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            log.info("%s", name)


def _ignore_name(name: str) -> None:
    pass


@contextmanager
def progress(description: str, total: int, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Show progress of `total` steps; yields a function that advances it, by one step or by its argument.

    A bar on a terminal; in a pipe a log line every ten seconds; nothing where `enabled` is false. In a sweep the steps
    of a cell are drawn by who shows the sweep (`cell_progress`).
    """
    if not enabled or total <= 0:
        yield _ignore
    elif cell_progress is not None:
        yield _HandedOn(cell_progress, description, total)
    elif CONSOLE.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=CONSOLE,
            transient=True,
        ) as bar:
            task = bar.add_task(description, total=total)
            yield partial(bar.advance, task)
    else:
        yield _LoggedProgress(description, total)


def _ignore(steps: float = 1) -> None:
    pass


class _LoggedProgress:
    """Progress as log lines, at most one every `seconds`."""

    def __init__(self, description: str, total: int, seconds: float = 10.0) -> None:
        self.description, self.total, self.seconds = description, total, seconds
        self.done, self.last = 0, time.monotonic()

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            log.info("%s: %d of %d", self.description, self.done, self.total)


class _HandedOn:
    """Progress for another to draw: the first and last step, and between them at most ten a second."""

    def __init__(self, draw: Draw, description: str, total: int, seconds: float = 0.1) -> None:
        self.draw, self.description, self.total, self.seconds = draw, description, total, seconds
        self.done, self.last = 0.0, time.monotonic()
        draw(description, 0, total)

    def __call__(self, steps: float = 1) -> None:
        self.done += steps
        if self.done >= self.total or time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.draw(self.description, self.done, self.total)
