"""What a sweep leaves behind its rows: a report, and a W&B run for the sweep as a whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from fa_research.config import TrackingConfig
from fa_research.text import plural
from fa_research.tracking import CONSOLE

log = logging.getLogger(__name__)


def report_and_mirror(config: DictConfig, sweep_dir: Path, tracebacks: bool) -> None:
    """Write the report if `sweep.report` asks for it, and mirror the sweep as `tracking` says; failures are logged.

    Args:
        config: the sweep's own, as Hydra composed it.
        tracebacks: log failures with theirs.
    """
    files = _report(sweep_dir, tracebacks) if config.sweep.report else []
    _mirror(config, sweep_dir, files, tracebacks)


def _report(sweep_dir: Path, tracebacks: bool) -> list[Path]:
    """Write report.html and figures, the page first; whatever becomes of them, the rows stand."""
    try:
        from fa_research.compare import sweep_report

        files = sweep_report.write(sweep_dir)
        page, *figures = files
        more = f" and {plural(len(figures), 'figure')} beside it" if figures else ""
        CONSOLE.print(f"{page}{more}", soft_wrap=True, markup=False)
        return files
    except Exception as error:
        log.warning("no report of this sweep: %s", error, exc_info=tracebacks)
        return []


def _mirror(config: DictConfig, sweep_dir: Path, files: list[Path], tracebacks: bool) -> None:
    """A W&B run for the sweep as a whole; whatever becomes of it, the rows stand."""
    try:
        from fa_research.compare.wandb_sweep import mirror_sweep

        tracking = cast(TrackingConfig, OmegaConf.to_object(config.tracking))
        if url := mirror_sweep(sweep_dir, tracking, config.study, files):
            CONSOLE.print(f"W&B: {url}", soft_wrap=True, markup=False)
    except Exception as error:
        log.warning("no W&B run of this sweep: %s", error, exc_info=tracebacks)
