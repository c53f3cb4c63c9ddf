"""The rows of a script: written as they come, and a line each on the screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fa_research.tracking import Row, RowWriter, environment
from fa_research.tracking.records import ROWS_FILE


def publish(measure: Callable[[bool], Iterable[Row]]) -> None:
    """Run `measure(small)` by the command line: OUT_FOLDER [--small]."""
    folder, small = Path(sys.argv[1]), "--small" in sys.argv
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder / ROWS_FILE) as writer:
        for row in measure(small):
            row.environment = environment()
            writer.write(row)
            numbers = {key: round(x, 2) for key, x in row.metrics.items()}
            print(f"{row.config['variant']:64} {row.status} {numbers or row.reasons}", flush=True)
