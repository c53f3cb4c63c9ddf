"""Sweeps: which cells are run and which have their row, what is on the screen meanwhile, all rows at the end."""

from __future__ import annotations

from fa_research.sweep.ending import report_and_mirror
from fa_research.sweep.launcher import RowPerCellLauncher, pin_sweep_dir
from fa_research.sweep.outcome import Outcome, gather, outcome, request_stop, running_a_cell, stop_requested

__all__ = [
    "Outcome",
    "RowPerCellLauncher",
    "gather",
    "outcome",
    "pin_sweep_dir",
    "report_and_mirror",
    "request_stop",
    "running_a_cell",
    "stop_requested",
]
