"""The process that runs cells, one after another: torch is imported once, and there is one CUDA context.

It talks with the process that started it (client.py) over one socket: requests come in; log records, progress and
results go out. It ends when that process does.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fa_research.config import Config
from fa_research.errors import CellLost, FaResearchError
from fa_research.isolation.health import context_lost, give_back_memory
from fa_research.tracking import Status
from fa_research.tracking.bars import hand_progress_to
from fa_research.tracking.cell_rows import count_rows, record_failure
from fa_research.tracking.failures import log_bug

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A cell to run, as `run_cell` takes it. `draws`: whether somebody draws its progress."""

    config: Config
    resolved: dict[str, Any]
    output_dir: Path
    against: Config | None
    draws: bool
    given: list[str]


@dataclass(frozen=True, slots=True)
class Done:
    """How a cell ended: its row as JSON, and why this process must not run another one (None: it may)."""

    row: str
    unfit: str | None


def main(descriptor: int) -> None:
    """Run cells from the socket `descriptor` until the other side closes it."""
    os.set_inheritable(descriptor, False)  # else the socket would outlive this process in those it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this process, who ends it then
    line = Line(Connection(descriptor))
    logging.basicConfig(level=logging.INFO, handlers=[_Sender(line)], force=True)
    from fa_research import runner

    gc.collect()
    gc.freeze()  # what the imports made stays: collecting after a cell need not look at it again
    while (request := line.next_request()) is not None:
        hand_progress_to((lambda *about: line.send("progress", about)) if request.draws else None)
        line.send("started", None)
        line.send("done", _run(request, runner.run_cell))


def _run(request: Request, run_cell: Any) -> Done:
    rows_before, folder = count_rows(request.output_dir), request.output_dir
    try:
        row = run_cell(
            request.config,
            resolved=request.resolved,
            output_dir=folder,
            multirun=True,
            against=request.against,
            given=request.given,
        )
    except Exception as error:
        lost = context_lost()
        notes = [f"the GPU's context was lost, so its process was replaced: {lost}"] if lost else []
        row = record_failure(folder, error, request.resolved, rows_before=rows_before, notes=notes)
        if row.status is Status.error and not isinstance(error, FaResearchError):
            log_bug(log, error)
        if lost:
            return Done(row.to_json(), lost)
    kept = give_back_memory()
    lost = context_lost()
    if lost and row.status is not Status.error:  # an asynchronous error, also from outside the timed region
        late = CellLost([f"the GPU's context was lost after the cell was timed: {lost}"])
        row = record_failure(folder, late, request.resolved, rows_before=count_rows(folder))
    return Done(row.to_json(), lost or kept)


class Line:
    """The socket to who started this process, and a thread that listens: if the other side is gone, so are we, also in
    the middle of a cell."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, kind: str, content: Any) -> None:
        """Hand on a message; any thread may."""
        with self._lock:
            self._connection.send((kind, content))

    def next_request(self) -> Request | None:
        """Wait for the next cell; None: there is none any more."""
        self._idle.set()
        request = self._requests.get()
        self._idle.clear()
        return request

    def _listen(self) -> None:
        try:
            while True:
                self._requests.put(self._connection.recv())
        except (EOFError, OSError):
            pass
        finally:
            self._requests.put(None)
        if not self._idle.is_set():
            os.killpg(0, signal.SIGKILL)  # nobody wants this cell's row any more


class _Sender(logging.Handler):
    """Log records go to the process that has the console and the cell's log file."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._line.send("log", (record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)
