"""Marks: innermost first, nothing without a listener."""

from __future__ import annotations

import pytest

from fa_research.phases import ATTENTION, METADATA, MODEL, listening, mark


def test_a_listener_hears_which_phase_is_at_hand_at_every_border() -> None:
    heard: list[str | None] = []
    with listening(heard.append):
        with mark(METADATA):
            pass
        with mark(MODEL), mark(ATTENTION):
            pass
    assert heard == [METADATA, None, MODEL, ATTENTION, MODEL, None]


def test_marks_are_one_object_that_does_nothing_when_nobody_listens() -> None:
    heard: list[str | None] = []
    with listening(heard.append):
        pass
    assert mark(METADATA) is mark(MODEL)
    with mark(METADATA):
        pass
    assert heard == []


def test_what_breaks_inside_leaves_nobody_listening_and_nothing_open() -> None:
    with pytest.raises(KeyError), listening(lambda phase: None), mark(MODEL), mark(ATTENTION):
        raise KeyError("broken")
    heard: list[str | None] = []
    with listening(heard.append), mark(METADATA):
        pass
    assert heard == [METADATA, None]


def test_two_cannot_listen_at_once() -> None:
    with listening(lambda phase: None), pytest.raises(AssertionError, match="already"), listening(print):
        pass
