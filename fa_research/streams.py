"""stdout and stderr that cannot be written to: closed by who started this process, or on a disk that is full."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def open_closed_streams() -> None:
    """Open os.devnull in the place of standard streams that this process was started without, as by `>&-`.

    Python leaves None for them, and the next file that is opened would have their number, for other programs too.
    """
    for name, mode, flags in (
        ("stdin", "r", os.O_RDONLY),
        ("stdout", "w", os.O_WRONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest that is free: that of the stream
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))


def replace_what_cannot_be_shown() -> None:
    """Print a question mark for each character that the encoding of stdout or stderr lacks, as in an ASCII locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop(stream: TextIO) -> None:
    """What is written to it from now on goes nowhere, with what it holds already and Python would flush at its exit."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def complain(line: str) -> None:
    """Print a line on stderr, if that takes one."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)
