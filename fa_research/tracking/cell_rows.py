"""The rows in a cell's folder, and the row of a cell that raised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fa_research.config import config_hash, to_plain
from fa_research.config.checkpoint import name_by_folder
from fa_research.config.explain import explain
from fa_research.tracking.environment import environment
from fa_research.tracking.failures import failed_row
from fa_research.tracking.records import ROWS_FILE, Row, RowWriter, rows_and_torn

log = logging.getLogger(__name__)


class CellLog(logging.FileHandler):
    """The log in a cell's folder, named in configs/hydra/job_logging. A full disk costs its lines and nothing else."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Once(logging.Filter):
    """Folders are read again and again, here and by the process that runs the cell, whose log comes here."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


_torn_log = logging.getLogger(f"{__name__}.torn")
_torn_log.addFilter(_Once())


def rows_of(folder: Path) -> list[Row]:
    """The rows in a cell's folder, oldest first; [] where there are none. A line that is no row (torn by a kill) is
    skipped, and logged once."""
    path = (folder / ROWS_FILE).absolute()  # as Hydra gives it to a cell: what is said of it is the same
    if not path.exists():
        return []
    rows, torn = rows_and_torn(path)
    for line in torn:
        _torn_log.warning(line)
    return [row for _, row in rows]


def count_rows(folder: Path) -> int:
    """Rows in this folder: of earlier attempts at the cell, or of another cell that had the folder before."""
    return len(rows_of(folder))


def record_failure(
    output_dir: Path,
    error: Exception,
    cfg: DictConfig | dict[str, Any],
    *,
    rows_before: int,
    overrides: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Row:
    """The row of a cell that raised, written to `output_dir` unless the cell has written its own: one more than the
    `rows_before` that were there when it began. `overrides` as for `config_hash`. Where the disk is full the row is
    only returned, and the log says so."""
    if len(written := rows_of(output_dir)) > rows_before:
        return written[-1]
    row = failed_row(error)
    row.environment = environment()
    row.notes += notes
    try:
        row.config, row.config_hash = to_plain(cfg), config_hash(cfg, overrides)
        name_by_folder(row.config)
    except OmegaConfBaseException as unresolved:
        row.notes.append(explain(unresolved))
    write_row(output_dir, row)
    return row


def write_row(folder: Path, row: Row) -> bool:
    """Append a row to those of a folder, made where it is missing; False, and an error in the log, where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with RowWriter(folder / ROWS_FILE) as writer:
            writer.write(row)
    except OSError as unwritable:
        log.error("cannot write a row to %s: %s", folder / ROWS_FILE, unwritable)
        return False
    return True
