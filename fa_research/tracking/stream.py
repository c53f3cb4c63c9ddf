"""Text that a model writes, on the screen as it comes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fa_research.tracking.screen import CONSOLE, lose

# Control characters but newline and tab, what turns the direction of writing, and halves of characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def printable(text: str) -> str:
    """The text with what a terminal might obey as escapes, as in `\\x1b`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def stream_text(pieces: Iterable[str]) -> tuple[str, str]:
    """Write a prompt (the first piece, bold on a terminal with colours) and what follows it to the console, each piece
    at once. Nothing else may be drawn meanwhile. Returns the prompt and the text as they were. Where nobody reads
    it any more, as after `| head -1`, the text is written for the row alone."""
    prompt: str | None = None
    written: list[str] = []
    for piece in pieces:
        if prompt is not None:
            written.append(piece)
            _write(printable(piece))
        else:
            prompt = piece
            shown = printable(piece)
            _write(f"{_BOLD}{shown}{_PLAIN}" if CONSOLE.color_system else shown)
    _write("\n")
    return prompt or "", "".join(written)


def _write(text: str) -> None:
    file = CONSOLE.file
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        file.flush()
    except OSError as error:
        lose(error)
