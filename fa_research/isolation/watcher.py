"""A single run that dies leaves a row too: a small process looks on, and writes it.

The cell runs in the process that the user started, where debuggers, profilers and Ctrl-C find it; the one that looks on
is forked from it before torch is imported, and waits. So it cannot ask for the signal that the run died of. Those that
come from a fault in the process itself (SIGSEGV, SIGABRT, ...) Python's faulthandler reports to it, with the stack;
one that leaves no time for that (SIGKILL) it knows by the silence.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fa_research.errors import CellLost
from fa_research.isolation.client import killed_by
from fa_research.tracking.cell_rows import count_rows, record_failure
from fa_research.tracking.failures import author_file

log = logging.getLogger(__name__)

_DONE = b"\0done"  # the run ended as Python programs end, whatever its result
_FAULTS = {
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating-point exception": signal.SIGFPE,
    "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}


@contextmanager
def watched(output_dir: Path, resolved: dict[str, Any], rows_before: int) -> Iterator[None]:
    """If this process dies in the block, without an exception, a row in `output_dir` and a line on the screen say so.
    `resolved` is the config as plain data; `rows_before` as for `record_failure`."""
    sys.stdout.flush()  # else what waits there would be written twice
    sys.stderr.flush()
    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            os.close(writer)
            os.setsid()  # signals for the run's group, such as Ctrl-C, are not for this process
            _look_on(parent, reader, output_dir, resolved, rows_before)
        finally:
            os._exit(0)
    os.close(reader)
    own_handler = not faulthandler.is_enabled()
    if own_handler:
        faulthandler.enable(writer)
    try:
        yield
    finally:
        if own_handler:
            faulthandler.disable()
        with suppress(OSError):
            os.write(writer, _DONE)
        os.close(writer)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _look_on(parent: int, reader: int, output_dir: Path, resolved: dict[str, Any], rows_before: int) -> None:
    oom_kills = _oom_kills()
    said = _listen(parent, reader)
    if said.endswith(_DONE):
        return
    reason = _how_it_ended(said.decode(errors="replace"), _oom_kills() > oom_kills)
    if count_rows(output_dir) == rows_before:
        record_failure(output_dir, CellLost([reason]), resolved, rows_before=rows_before)
    if said:
        log.error("its stack, innermost call first:\n%s", said.decode(errors="replace"))
    log.error("%s; row, config and log are in %s", reason, output_dir)


def _listen(parent: int, reader: int) -> bytes:
    """What the run wrote until it ended; children of its own may hold the pipe open longer."""
    sources = [reader]
    with suppress(OSError, AttributeError):  # systems that lack it
        sources.append(os.pidfd_open(parent))
    said, ended = b"", False
    while not said.endswith(_DONE):
        ready, _, _ = select.select(sources, [], [], 0 if ended else None)
        if reader in ready and (piece := os.read(reader, 1 << 16)):
            said += piece
        elif ready and not ended and reader not in ready:
            ended = True  # once more, for what it wrote last
        else:
            break
    return said


def _how_it_ended(dump: str, oom: bool) -> str:
    fault = re.search(r"Fatal Python error: (.+)", dump)
    if fault is None and oom:
        return (
            "its process was killed by SIGKILL: memory ran out, and the kernel's OOM killer ended a process"
        )
    if fault is None:
        return (
            "its process ended without a word: it was killed from outside (SIGKILL, as the kernel does when memory "
            "runs out), or a library ended it"
        )
    number = _FAULTS.get(fault[1].strip())
    how = killed_by(number) if number else f"ended by a fatal error: {fault[1].strip()}"
    current = dump[max(dump.find("Current thread"), 0) :].partition("\n\n")[0]
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', current)[::-1]
    if not frames:
        return f"its process {how}"
    file, line, function = frames[author_file([file for file, _, _ in frames])]
    return f"its process {how}, in {function} ({Path(file).name}:{line})"


def _oom_kills() -> int:
    """How many processes of this machine the kernel has ended for want of memory; 0 where it does not say."""
    with suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(found[1])
    return 0
