"""What became of the cells of a sweep: the rows in their folders, and what no folder tells."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fa_research.errors import ConfigError
from fa_research.sweep.lifeline import end_with_launcher
from fa_research.tracking.cell_rows import rows_of
from fa_research.tracking.wandb_offline import try_again

if TYPE_CHECKING:
    from fa_research.tracking import Row

log = logging.getLogger(__name__)

# In the sweep's folder. Shared by the process that launches the sweep and by those that run a cell of it: only a sweep
# that begins wants it alone, for a moment.
_LOCK_FILE = ".lock"
_PATIENCE_S = 2.0  # processes of a sweep that was killed end a moment after it
_STOP_FILE = ".stopped"  # in the sweep's folder: with sweep.fail_fast, cells that have not begun are not run


@dataclass(slots=True)
class Outcome:
    """Of the sweep that this process launched.

    Attributes:
        folders: of its cells, by number; those that `sweep.exclude` left out are not among them.
        not_run: numbers of the cells that `sweep.fail_fast` kept from running.
        unwritten: rows that the disk did not take, by number.
        lock: keeps other sweeps from the folder; it goes with the process.
    """

    folders: dict[int, Path] = field(default_factory=dict)
    not_run: list[int] = field(default_factory=list)
    unwritten: dict[int, Row] = field(default_factory=dict)
    lock: int | None = None


_outcome = Outcome()


def outcome() -> Outcome:
    """The outcome of the sweep under way."""
    return _outcome


def begin(sweep_dir: Path) -> Outcome:
    """A sweep begins, or goes on. Raises ConfigError if another process runs one into the folder."""
    global _outcome
    if _outcome.lock is not None:
        os.close(_outcome.lock)
    _outcome = Outcome(lock=_lock(sweep_dir))
    (sweep_dir / _STOP_FILE).unlink(missing_ok=True)
    try_again(sweep_dir)
    return _outcome


def _lock(sweep_dir: Path) -> int | None:
    """The lock of a folder, as a descriptor; None on a file system that has no locks, or no room."""
    ends = time.monotonic() + _PATIENCE_S
    while (descriptor := _open_lock(sweep_dir)) is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                return None
        if time.monotonic() > ends:
            raise ConfigError(
                f"hydra.sweep.dir={sweep_dir}: another process runs a sweep into it, or cells of one that ended, and "
                "their rows would mix; wait for its end or give another folder"
            )
        time.sleep(0.1)
    return None


def _open_lock(sweep_dir: Path) -> int | None:
    try:
        return os.open(sweep_dir / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        return None


@contextmanager
def running_a_cell(sweep_dir: Path) -> Iterator[None]:
    """Keeps other sweeps from the folder meanwhile. If the process that launched this one ends, so does this process,
    where it is one of a launcher of this machine."""
    end_with_launcher()
    descriptor = _open_lock(sweep_dir)
    try:
        if descriptor is not None:
            with suppress(OSError):  # no locks here
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def request_stop(sweep_dir: Path) -> None:
    """Keep cells of this sweep from beginning, in whatever process a launcher would run them."""
    with suppress(OSError):
        (sweep_dir / _STOP_FILE).touch()


def stop_requested(sweep_dir: Path) -> bool:
    """Whether a cell has failed that the others should not follow."""
    return (sweep_dir / _STOP_FILE).exists()


def gather(sweep_dir: Path, known: Outcome | None = None) -> list[Row]:
    """The rows of all cells of a sweep in job order, written to its rows.jsonl too; a cell without a row is logged.

    Folders of cells that `known` does not have (of a longer sweep that used the folder before) are left alone.
    """
    known = known or Outcome(folders=dict(enumerate(_folders(sweep_dir))))
    rows: list[Row] = []
    for number, folder in sorted(known.folders.items()):
        found = [known.unwritten[number]] if number in known.unwritten else rows_of(folder)[-1:]
        if not found and number not in known.not_run:
            log.warning("%s has no row: its process ended before it could write one", folder)
        rows.extend(found)
    _write(sweep_dir, rows)
    return rows


def _write(sweep_dir: Path, rows: list[Row]) -> None:
    from fa_research.tracking import ROWS_FILE, RowWriter

    new = sweep_dir / (ROWS_FILE + ".new")
    try:
        new.unlink(missing_ok=True)
        with RowWriter(new) as writer:
            for row in rows:
                writer.write(row)
        new.replace(sweep_dir / ROWS_FILE)  # whole or not at all
    except OSError as error:
        log.error("cannot write %s: %s; the rows are in the cells' folders", sweep_dir / ROWS_FILE, error)


def _folders(sweep_dir: Path) -> list[Path]:
    """The folders of a sweep's cells, by their numbers where they have one."""
    found = {path.parent for pattern in (".hydra", "rows.jsonl") for path in sweep_dir.rglob(pattern)}

    def order(folder: Path) -> tuple[int, Path]:
        return (int(folder.name) if folder.name.isdecimal() else -1), folder

    return sorted(found - {sweep_dir}, key=order)


def rows_by_hash(sweep_dir: Path) -> dict[str, Row]:
    """The newest row of each config in the folders of a sweep's cells, by config hash; none that ended in an error."""
    found: dict[str, Row] = {}
    for folder in _folders(sweep_dir):
        for row in rows_of(folder):
            if row.config_hash and (
                row.config_hash not in found or found[row.config_hash].finished <= row.finished
            ):
                found[row.config_hash] = row
    return {digest: row for digest, row in found.items() if str(row.status) != "error"}
