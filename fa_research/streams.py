"""What this process was started with: streams that cannot be written to, and a locale that knows ASCII alone."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where the locale knows ASCII alone, so that arguments, names of
    files and what is in them may hold any text. The screen stays ASCII. Returns in every other locale."""
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts, too
    os.environ["PYTHONIOENCODING"] = os.environ.get("PYTHONIOENCODING") or "ascii:replace"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
