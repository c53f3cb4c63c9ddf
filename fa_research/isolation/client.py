"""The launching process's side of a worker: starts it, hands it cells, shows what it says, and tells how it died."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, cast

from rich.text import Text

from fa_research.errors import CellLost
from fa_research.isolation.worker import Done, Request
from fa_research.tracking import CONSOLE, bars

log = logging.getLogger(__name__)

START_S = 600.0  # for its imports, which on a cold disk take minutes
_LOOK_S = 2.0  # between looks at whether it lives, where it says nothing
_LAST_LINES = 8  # of what it wrote to stderr go into the row of a cell that was lost
_SHOWN_LINES = 100  # of each cell: a failed assertion on a GPU writes one line a thread
_BOOT = (  # the fingerprint of the code before any of it is imported
    "import sys; sys.path[:] = sys.argv[2:]; from fa_research import fingerprint; fingerprint.take(); "
    "from fa_research.isolation.worker import main; main(int(sys.argv[1]))"
)
_MEANING: dict[int, str] = {
    signal.SIGKILL: "from outside, as the kernel does when memory runs out",
    signal.SIGSEGV: "it used memory that is not its own",
    signal.SIGABRT: "a library gave up",
    signal.SIGBUS: "it used memory that is not there",
}


def killed_by(number: int) -> str:
    """In words, for a signal's number."""
    meaning = f" ({_MEANING[number]})" if number in _MEANING else ""
    return f"was killed by {signal.Signals(number).name}{meaning}"


class Worker:
    """A process that runs cells, one after another, until it is closed or dies.

    Attributes:
        gpu: what CUDA_VISIBLE_DEVICES is in it; None: as here.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), *sys.path],
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
        stdout, stderr = (_Lines(cast(RawIOBase, s)) for s in (self._process.stdout, self._process.stderr))
        stdout.show, stderr.show = _print, log.info
        self._out, self._errors, self._used = stdout, stderr, False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, request: Request, timeout_s: float) -> Done:
        """Run one cell. Raises CellLost if the process does not live to its end, or is ended after `timeout_s`."""
        self._used = True
        self._out.begin_cell()
        self._errors.begin_cell()
        with suppress(OSError):  # it died since the last cell: reading will tell how
            self._connection.send(request)
        patience, ends = f"did not start within {START_S:g} s", time.monotonic() + START_S
        while (left := ends - time.monotonic()) > 0:
            ready = self._ready(min(left, _LOOK_S))
            if not (ready or self.alive or self._ready(0)):  # what it forked may keep the socket open
                raise self._lost()
            for source in ready:
                if isinstance(source, _Lines):
                    source.read()
                    continue
                match self._receive():
                    case "started", _:
                        patience = f"was stopped after measure.timeout_s={timeout_s:g}"
                        ends = time.monotonic() + timeout_s
                    case "done", done:
                        self._drain()
                        return cast(Done, done)
                    case kind, content:
                        _hand_on(kind, content)
        self._drain()
        self.kill()
        raise CellLost([f"its process {patience}", *self._last_words()])

    def _ready(self, seconds: float) -> list[Connection | _Lines]:
        sources = [self._connection, *(lines for lines in (self._out, self._errors) if lines.open)]
        return cast("list[Connection | _Lines]", wait(cast(Any, sources), seconds))

    def _receive(self) -> tuple[str, Any]:
        try:
            return cast("tuple[str, Any]", self._connection.recv())
        except (EOFError, OSError):
            raise self._lost() from None

    def _lost(self) -> CellLost:
        self._drain()
        return CellLost([f"its process {self._how_it_ended()}", *self._last_words()])

    def _drain(self) -> None:
        """Read what it has written so far, so that it is in the log of the cell that it belongs to."""
        for lines in (self._out, self._errors):
            for _ in range(1000):
                if not (lines.open and wait(cast(Any, [lines]), 0)):
                    break
                lines.read()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code >= 0:
            return f"ended with exit code {code}"
        return killed_by(-code)

    def _last_words(self) -> list[str]:
        words = list(self._errors.last)
        return [f"its last lines were: {' | '.join(words)}"] if words else []

    def kill(self) -> None:
        """End it and all that it started, now."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close_pipes()

    def close(self) -> None:
        """Give it a moment to end by itself, if it has run a cell."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5 if self._used else 0)
        self.kill()

    def _close_pipes(self) -> None:
        self._connection.close()
        self._out.close()
        self._errors.close()


class _Lines:
    """Lines of a pipe as they come; `last` are the last few of the cell."""

    show: Callable[[str], object]

    def __init__(self, pipe: RawIOBase) -> None:
        self.open = True
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._pipe, self._rest, self._shown = pipe, b"", 0

    def fileno(self) -> int:
        return self._pipe.fileno()

    def begin_cell(self) -> None:
        self.last.clear()
        self._shown = 0

    def read(self) -> None:
        """Take what is there; call it when there is something."""
        piece = os.read(self.fileno(), 1 << 16)
        self.open = bool(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if not piece and self._rest:
            lines, self._rest = [self._rest], b""
        for line in lines:
            self._take(line.decode(errors="replace").rstrip().rpartition("\r")[2])

    def _take(self, line: str) -> None:
        if line.strip():
            self.last.append(line.strip()[:500])
        self._shown += 1
        if self._shown <= _SHOWN_LINES:
            self.show(line)
        elif self._shown == _SHOWN_LINES + 1:
            self.show("... and more, left out here")

    def close(self) -> None:
        self.open = False
        self._pipe.close()


def _print(line: str) -> None:
    CONSOLE.print(Text(line), soft_wrap=True)


def _hand_on(kind: str, content: Any) -> None:
    if kind == "log":
        name, level, text = content
        logging.getLogger(name).log(level, "%s", text)
    elif kind == "progress" and bars.cell_progress is not None:
        bars.cell_progress(*content)
