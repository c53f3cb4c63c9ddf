"""Results: rows on disk always, W&B as a mirror, the screen as a courtesy."""

from __future__ import annotations

from fa_research.tracking.bars import progress, stages
from fa_research.tracking.environment import environment
from fa_research.tracking.failures import failed_row
from fa_research.tracking.records import ROWS_FILE, Row, RowWriter, Status, read_rows
from fa_research.tracking.screen import CONSOLE, print_table
from fa_research.tracking.stream import stream_text
from fa_research.tracking.wandb_mirror import WandbMirror, wandb_run

__all__ = [
    "CONSOLE",
    "ROWS_FILE",
    "Row",
    "RowWriter",
    "Status",
    "WandbMirror",
    "environment",
    "failed_row",
    "print_table",
    "progress",
    "read_rows",
    "stages",
    "stream_text",
    "wandb_run",
]
