"""Choices that YAML 1.1 reads as truth values: `mode: off` in a preset is False before a schema sees it. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from omegaconf.nodes import EnumNode

_WORDS = {False: ("off", "no", "false"), True: ("on", "yes", "true")}


def meant(choices: Iterable[str], value: Any) -> list[str]:
    """The choices that are spelt like a truth value and mean `value`: a bool, or another spelling of it as text."""
    words = next((words for truth, words in _WORDS.items() if _reads_as(value, truth)), ())
    return [choice for choice in choices if choice in words]


def _reads_as(value: Any, truth: bool) -> bool:
    return value is truth or (isinstance(value, str) and value.lower() in _WORDS[truth])


def hint(choices: Iterable[str], value: Any) -> str:
    """For a value that is no choice: how YAML came to it, and what to write; empty where YAML has no part in it."""
    choices = list(choices)
    if value is None:
        return '; YAML reads null as no value, so write "none"' if "none" in choices else ""
    if not isinstance(value, bool):
        return ""
    could_be = " or ".join(f'"{word}"' for word in meant(choices, value))
    bare = f"YAML reads bare {', '.join(_WORDS[value])} as {str(value).lower()}"
    return f"; {bare}, so quote it: {could_be}" if could_be else f"; {bare}"


def accept_truth_values() -> None:
    """Have enum keys take a truth value for the one choice that it can mean: `off` for False, `on` for True."""
    convert = EnumNode.validate_and_convert_to_enum
    if getattr(convert, "takes_truth_values", False):
        return

    def convert_words(enum_type: type[Enum], value: Any) -> Enum:
        names = list(enum_type.__members__)
        if isinstance(value, bool | str) and value not in names and len(found := meant(names, value)) == 1:
            return enum_type[found[0]]
        return convert(enum_type, value)

    convert_words.takes_truth_values = True  # type: ignore[attr-defined]
    EnumNode.validate_and_convert_to_enum = staticmethod(convert_words)  # type: ignore[method-assign]
