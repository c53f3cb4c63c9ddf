"""`sweep.exclude`: cells to leave out, each entry as assignments that must all hold: `backend=fa4,kv.page_size=1`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fa_research.config import Config
from fa_research.config.explain import unknown_key
from fa_research.errors import ConfigError
from fa_research.sweep.cells import Cell

_COMMA = re.compile(r",(?=\s*[~+]*[\w./@]+\s*=)")  # before the next assignment, not within a list
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Exclusion:
    """One entry: it matches a cell that has all of these values. `text` is the entry as it was given."""

    text: str
    values: tuple[tuple[str, Any], ...]

    def matches(self, cell: Cell) -> bool:
        """Whether a cell is to be left out."""
        return all(_has(cell, key, value) for key, value in self.values)


def parse(entries: Iterable[str]) -> list[Exclusion]:
    """Raises ConfigError for an entry that is no list of assignments."""
    return [_parse(str(entry)) for entry in entries]


def _parse(entry: str) -> Exclusion:
    parser = OverridesParser.create()
    try:
        given = parser.parse_overrides([part.strip() for part in _COMMA.split(entry)])
    except HydraException:
        given = []
    if not given or any(override.is_sweep_override() or override.is_delete() for override in given):
        raise ConfigError(
            f"sweep.exclude: {entry!r} is no list of assignments; write for instance "
            "sweep.exclude=['backend=fa4,kv.page_size=1','workload.batch_size=1']"
        )
    return Exclusion(
        entry, tuple((override.get_key_element().lstrip("+"), override.value()) for override in given)
    )


def check(exclusions: Sequence[Exclusion], cells: Sequence[Cell]) -> list[str]:
    """Entries that match no cell. Raises ConfigError for keys that no cell has."""
    for exclusion in exclusions:
        for key, _ in exclusion.values:
            if not any(key in cell.choices or _value(cell, key) is not _ABSENT for cell in cells):
                raise ConfigError(f"sweep.exclude: {exclusion.text!r}: {_unknown(key)}")
    return [exclusion.text for exclusion in exclusions if not any(map(exclusion.matches, cells))]


def _has(cell: Cell, key: str, value: Any) -> bool:
    found, given = _value(cell, key), str(value)
    if isinstance(found, dict) or found is _ABSENT:  # a group: by its choice, or by what it says its name is
        named = found.get("name") if isinstance(found, dict) else None
        return given in (cell.choices.get(key), named)
    return bool(found == value) or str(found) == given


def _value(cell: Cell, key: str) -> Any:
    node: Any = cell.plain
    for name in key.split("."):
        node = node.get(name, _ABSENT) if isinstance(node, dict) else _ABSENT
    return node


def _unknown(key: str) -> str:
    """Says what there is instead of `key`."""
    schema: type | None = Config
    for name in key.split(".")[:-1]:
        hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
        schema = hints.get(name)
    return f"unknown key {key}" if schema is None else unknown_key(key, schema)
