"""What became of the cells of a sweep: the rows in their folders, and what no folder tells."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fa_research.tracking.cell_rows import rows_of

if TYPE_CHECKING:
    from fa_research.tracking import Row

log = logging.getLogger(__name__)

_STOP_FILE = ".stopped"  # in the sweep's folder: with sweep.fail_fast, cells that have not begun are not run


@dataclass(slots=True)
class Outcome:
    """Of the sweep that this process launched.

    Attributes:
        jobs: numbers of its cells, those that were left out by `sweep.exclude` not among them.
        not_run: numbers of the cells that `sweep.fail_fast` kept from running.
        unwritten: rows that the disk did not take, by number.
    """

    jobs: list[int] = field(default_factory=list)
    not_run: list[int] = field(default_factory=list)
    unwritten: dict[int, Row] = field(default_factory=dict)


_outcome = Outcome()


def outcome(new: bool = False) -> Outcome:
    """The outcome of the sweep under way; `new`: one begins."""
    global _outcome
    if new:
        _outcome = Outcome()
    return _outcome


def request_stop(sweep_dir: Path) -> None:
    """Keep cells of this sweep from beginning, in whatever process a launcher would run them."""
    with suppress(OSError):
        (sweep_dir / _STOP_FILE).touch()


def stop_requested(sweep_dir: Path) -> bool:
    """Whether a cell has failed that the others should not follow."""
    return (sweep_dir / _STOP_FILE).exists()


def clear_stop(sweep_dir: Path) -> None:
    """A sweep begins, or goes on."""
    (sweep_dir / _STOP_FILE).unlink(missing_ok=True)


def gather(sweep_dir: Path, known: Outcome | None = None) -> list[Row]:
    """The rows of all cells of a sweep in job order, written to its rows.jsonl too; a cell without a row is logged.

    Folders of cells that `known` does not have (of a longer sweep that used the folder before) are left alone.
    """
    rows: list[Row] = []
    for folder, number in _cells(sweep_dir):
        if known is not None and number is not None and number not in known.jobs:
            continue
        unwritten = known.unwritten.get(number) if known is not None and number is not None else None
        found = [unwritten] if unwritten else rows_of(folder)[-1:]
        if not found and (known is None or number not in known.not_run):
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


def _cells(sweep_dir: Path) -> list[tuple[Path, int | None]]:
    """The folders of a sweep's cells with their job numbers where they have one, in that order."""
    found = {path.parent for pattern in (".hydra", "rows.jsonl") for path in sweep_dir.rglob(pattern)}
    numbered = {folder: int(folder.name) if folder.name.isdigit() else None for folder in found - {sweep_dir}}

    def order(folder: Path) -> tuple[int, Path]:
        number = numbered[folder]
        return (-1 if number is None else number), folder

    return [(folder, numbered[folder]) for folder in sorted(numbered, key=order)]


def rows_by_hash(sweep_dir: Path) -> dict[str, Row]:
    """The newest row of each config in the folders of a sweep's cells, by config hash; none that ended in an error."""
    found: dict[str, Row] = {}
    for folder, _ in _cells(sweep_dir):
        for row in rows_of(folder):
            if row.config_hash and (
                row.config_hash not in found or found[row.config_hash].finished <= row.finished
            ):
                found[row.config_hash] = row
    return {digest: row for digest, row in found.items() if str(row.status) != "error"}
