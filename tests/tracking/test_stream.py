"""Text on the screen as it comes: in a pipe, on a terminal, and without what a terminal would obey."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from fa_research.tracking import stream, stream_text
from fa_research.tracking.stream import printable


class Watched(io.StringIO):
    """Keeps what was visible at each flush."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self.flushed: list[str] = []
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def console(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, terminal: bool) -> None:
    color = "truecolor" if terminal else None
    monkeypatch.setattr(
        stream,
        "CONSOLE",
        Console(file=file, force_terminal=terminal, color_system=color),  # type: ignore[arg-type]
    )


def test_every_piece_is_visible_before_the_next_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Watched()
    console(monkeypatch, file, terminal=False)
    seen: list[str] = []

    def pieces() -> Iterator[str]:
        for piece in ("def ", "f(", "", "[x]\t", "é\n"):
            seen.append(file.flushed[-1] if file.flushed else "")
            yield piece

    assert stream_text(pieces()) == ("def ", "f([x]\té\n")
    assert seen == ["", "def ", "def f(", "def f(", "def f([x]\t"]
    assert file.getvalue() == "def f([x]\té\n\n"


def test_the_prompt_stands_out_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Watched()
    console(monkeypatch, file, terminal=True)
    assert stream_text(iter(["a\x1b[2J", "b\x1b]0;title\x07"])) == ("a\x1b[2J", "b\x1b]0;title\x07")
    assert file.getvalue() == "\x1b[1ma\\x1b[2J\x1b[0mb\\x1b]0;title\\x07\n"


def test_an_encoding_without_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Watched("ascii")
    console(monkeypatch, file, terminal=False)
    stream_text(["é", "数x"])
    assert file.getvalue() == "\\xe9\\u6570x\n"


def test_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Watched()
    console(monkeypatch, file, terminal=False)
    assert stream_text([]) == ("", "")


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\tb\nc é 数 🙂\u200d") == "a\tb\nc é 数 🙂\u200d"
    assert printable("\r\x08\x00\x7f\x9b\u202e\ud83d") == "\\r\\x08\\x00\\x7f\\x9b\\u202e\\ud83d"
    every = "".join(map(chr, range(0x20))) + "".join(map(chr, range(0x7F, 0xA0)))
    assert not any((ord(c) < 32 or 0x7F <= ord(c) < 0xA0) and c not in "\t\n" for c in printable(every))
