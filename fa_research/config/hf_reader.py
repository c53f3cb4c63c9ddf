"""Reads the keys of a config.json, or of a table in it, and keeps what is wrong with them. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class Reader:
    """Each method returns a key's value, or the default where it is absent or null. What is wrong goes to `problems`,
    and a stand-in is returned, so that one reading finds everything."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None) -> None:
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = [] if problems is None else problems

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return self._wrong(key, "a whole number above 0", 1)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._given(key, default)
        if not _is_number(value):
            return self._wrong(key, "a number", 1.0)
        return float(value)

    def optional(self, key: str, default: float | None = None) -> float | None:
        """A number, or None for null: only an absent key has the default."""
        if key not in self.raw:
            return default
        return None if self.raw[key] is None else self.number(key)

    def numbers(self, key: str) -> list[float]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            return self._wrong(key, "a list of numbers", [])
        return list(map(float, value))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._given(key, default)
        return value if isinstance(value, bool) else self._wrong(key, "true or false", default)

    def table(self, key: str) -> Mapping[str, Any]:
        """A JSON object; an empty one where there is none."""
        value = self.raw.get(key) or {}
        return value if isinstance(value, dict) else self._wrong(key, "an object", {})

    def refuse(self, key: str, because: str = "") -> None:
        self.problems.append(f"{self.prefix}{key}={json.dumps(self.raw.get(key))} is not supported{because}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def _wrong(self, key: str, expected: str, stand_in: Any) -> Any:
        given = f"={json.dumps(self.raw[key])}" if key in self.raw else " is missing"
        self.problems.append(f"{self.prefix}{key}{given}: expected {expected}")
        return stand_in


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
