"""Cells of a sweep in a process of their own, which stays alive between them and is replaced when it is spoilt.

This process imports no torch. What a cell does to its process (a crash, an illegal access on the GPU, a hang, memory
that never comes back) costs that cell and the start of a new process.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fa_research.config import Config, Device
from fa_research.isolation.client import Worker
from fa_research.isolation.gpus import GpuShare, lock_folder, visible_gpus
from fa_research.isolation.worker import Request
from fa_research.tracking import Row, bars

__all__ = ["close", "prepare", "run_apart"]

log = logging.getLogger(__name__)

# One of each for a launcher's process.
_worker: Worker | None = None
_share: GpuShare | None = None


def run_apart(
    config: Config,
    *,
    resolved: dict[str, Any],
    output_dir: Path,
    against: Config | None = None,
    given: Sequence[str] = (),
) -> Row:
    """Run one cell in the worker process; its row is on disk in `output_dir` by then, unless the disk is full.

    Waits for the GPU where another process of this user runs a cell on it. Raises CellLost if the worker died or took
    longer than `measure.timeout_s`; whatever else goes wrong in a cell comes back as a row.
    """
    share = _share_for(config.device)
    worker = _ready_worker(share)
    request = Request(config, resolved, output_dir, against, bars.cell_progress is not None, list(given))
    with share.turn(log.info) if share else nullcontext():
        try:
            done = worker.run(request, config.measure.timeout_s)
        except BaseException:
            _end(kill=True)
            raise
    if done.unfit:
        log.info("a new worker process for the next cell: %s", done.unfit)
        _end(kill=True)
    return Row.from_json(done.row)


def prepare(device: Device) -> None:
    """Start the worker for cells that come soon, so that its imports are done by then."""
    _ready_worker(_share_for(device))


def close() -> None:
    """End the worker; the next cell starts another."""
    global _share
    _end()
    if _share is not None:
        _share.close()
        _share = None


atexit.register(close)


def _share_for(device: Device) -> GpuShare | None:
    """The GPU of this process, chosen once; None where there is none, or none is asked for."""
    global _share
    if device is Device.cpu:
        return None
    if _share is None and (gpus := visible_gpus()):
        _share = GpuShare(gpus, lock_folder())
    return _share


def _ready_worker(share: GpuShare | None) -> Worker:
    """The worker, started if there is none yet, or if it was started for cells that need no GPU and this one does."""
    global _worker
    gpu = share.uuid if share else None
    if _worker is not None and (not _worker.alive or gpu not in (None, _worker.gpu)):
        _end()
    if _worker is None:
        _worker = Worker(gpu)
    return _worker


def _end(kill: bool = False) -> None:
    global _worker
    worker, _worker = _worker, None
    if worker is not None:
        worker.kill() if kill else worker.close()
