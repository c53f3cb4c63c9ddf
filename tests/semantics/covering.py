"""Few rows that hold every pair of values that can occur together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering(
    dimensions: Mapping[str, Sequence[Any]], full: Sequence[str], supported: Sequence[Row]
) -> list[Row]:
    """Rows that hold every pair of values of two dimensions, and every combination of the dimensions `full`, as far as
    they occur in `supported`. Its rows all have the same dimensions, some of `dimensions`; the others go with
    everything. The result is the same in every process, because test runners that share the work compare it."""
    if not supported:
        return []
    names = [*full, *(name for name in dimensions if name not in full)]
    missing = dict.fromkeys(
        _possible_pairs(names, dimensions, supported)
    )  # a dict and not a set, for its order
    rows: list[Row] = []

    def gain(row: Row) -> int:
        return sum(pair in missing for pair in _pairs(names, row))

    def add(row: Row) -> None:
        left = _matching(supported, row)
        for bit, name in enumerate([name for name in names if name not in row]):
            values = _values(name, dimensions, left)
            # Where no value gains a pair: switches as the bits of the row's number, of sizes the cheapest.
            start = len(rows) >> bit & 1 if len(values) == 2 else 0
            row = max(({**row, name: x} for x in values[start:] + values[:start]), key=gain)
            left = _matching(left, {name: row[name]})
        for pair in _pairs(names, row):
            missing.pop(pair, None)
        rows.append(row)

    for combination in itertools.product(*(dimensions[name] for name in full)):
        row = dict(zip(full, combination, strict=True))
        if _matching(supported, row):
            add(row)
    while missing:
        add(dict(next(iter(missing))))
    return rows


def _pairs(names: Sequence[str], row: Row) -> list[tuple[Any, ...]]:
    return list(itertools.combinations(((name, row[name]) for name in names if name in row), 2))


def _possible_pairs(
    names: Sequence[str], dimensions: Mapping[str, Sequence[Any]], supported: Sequence[Row]
) -> list[tuple[Any, ...]]:
    found = []
    for a, b in itertools.combinations(names, 2):
        together = {(row[a], row[b]) for row in supported} if {a, b} <= supported[0].keys() else None
        for x, y in itertools.product(*(_values(name, dimensions, supported) for name in (a, b))):
            if together is None or (x, y) in together:
                found.append(((a, x), (b, y)))
    return found


def _matching(supported: Sequence[Row], row: Row) -> Sequence[Row]:
    for name, value in row.items():
        if name in supported[0]:
            supported = [each for each in supported if each[name] == value]
            if not supported:
                break
    return supported


def _values(name: str, dimensions: Mapping[str, Sequence[Any]], supported: Sequence[Row]) -> list[Any]:
    """The values of a dimension that occur, in the order given."""
    if name not in supported[0]:
        return list(dimensions[name])
    occur = {row[name] for row in supported}
    return [value for value in dimensions[name] if value in occur]
