"""The decision map: one key along, every combination of the others down, in each place who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fa_research.compare.cells import Cell
from fa_research.compare.keys import order_of
from fa_research.compare.verdicts import Verdict

# What a serving system sees change first is drawn along, where it varies.
_FIRST = ("context_len", "length", "new_len", "prompt_len", "prefix_len")
_SECOND = ("batch_size", "requests", "extend_requests", "decode_requests")
Places = dict[Any, int]  # a value of the key along: a cell's number


@dataclass
class DecisionMap:
    """Which cell stands where.

    Attributes:
        x: the key along.
        keys: the keys down, the one that is read first in front.
        rows: values of `keys`, and the cells of the row.
    """

    x: str
    keys: list[str]
    rows: list[tuple[dict[str, Any], Places]] = field(default_factory=list)

    @property
    def xs(self) -> list[Any]:
        return sorted({x for _, places in self.rows for x in places}, key=order_of)


def axes(cells: Sequence[Cell]) -> list[str]:
    """The keys that vary between cells, the most telling first: context, batch size, then those with many values."""
    keys = list(cells[0].where) if cells else []
    values = {key: len({repr(cell.where[key]) for cell in cells}) for key in keys}

    def rank(key: str) -> tuple[int, int]:
        last = key.rpartition(".")[2]
        return (0 if last in _FIRST else 1 if last in _SECOND else 2, -values[key])

    return sorted(keys, key=rank)


def decision_map(cells: Sequence[Cell]) -> DecisionMap | None:
    """The map of these cells; None where nothing varies between them."""
    order = axes(cells)
    if not order:
        return None
    x, *keys = order
    drawn = DecisionMap(x, keys)
    rows: dict[str, Places] = {}
    for number, cell in enumerate(cells):
        where = {key: cell.where[key] for key in keys}
        if repr(where) not in rows:
            rows[repr(where)] = {}
            drawn.rows.append((where, rows[repr(where)]))
        rows[repr(where)][cell.where[x]] = number
    drawn.rows.sort(key=lambda row: [order_of(value) for value in row[0].values()])
    return drawn


def winner(verdict: Verdict) -> str:
    """The answer that wins, `tie`, `not judged`, or `none`."""
    if verdict.unjudged:
        return "not judged"
    return "tie" if verdict.is_tie else verdict.best[0] if verdict.best else "none"
