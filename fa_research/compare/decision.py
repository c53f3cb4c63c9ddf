"""The decision map: two keys as axes, one map for each combination of the rest, in each place who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fa_research.compare.cells import Cell
from fa_research.compare.keys import order_of, title_of
from fa_research.compare.verdicts import Verdict

# The key along which a serving system changes first is the x-axis, where it varies; then the next.
_FIRST = ("context_len", "length", "new_len", "prompt_len", "prefix_len")
_SECOND = ("batch_size", "requests", "extend_requests", "decode_requests")


@dataclass
class DecisionMap:
    """Verdicts by (y, x); `where` are the other keys' values. y is None where only one key varies."""

    x: str
    y: str | None
    where: dict[str, Any]
    places: dict[tuple[Any, Any], list[tuple[Cell, Verdict]]] = field(default_factory=dict)

    @property
    def xs(self) -> list[Any]:
        return sorted({x for _, x in self.places}, key=order_of)

    @property
    def ys(self) -> list[Any]:
        return sorted({y for y, _ in self.places}, key=order_of)

    @property
    def title(self) -> str:
        return title_of(self.where)


def axes(cells: Sequence[Cell]) -> tuple[str | None, str | None]:
    """The keys to draw along x and y: context before batch size before what has the most values."""
    values = {key: {repr(cell.where[key]) for cell in cells} for key in (cells[0].where if cells else ())}

    def rank(key: str) -> tuple[int, int]:
        last = key.rpartition(".")[2]
        return (0 if last in _FIRST else 1 if last in _SECOND else 2, -len(values[key]))

    order = [*sorted(values, key=rank), None, None]
    return order[0], order[1]


def decision_maps(cells: Sequence[Cell], verdicts: Sequence[Verdict]) -> list[DecisionMap]:
    """Every map there is to draw, in the order of the cells; [] where nothing varies between cells."""
    x, y = axes(cells)
    if x is None:
        return []
    maps: dict[str, DecisionMap] = {}
    for cell, verdict in zip(cells, verdicts, strict=True):
        where = {key: value for key, value in cell.where.items() if key not in (x, y)}
        found = maps.setdefault(repr(where), DecisionMap(x, y, where))
        place = (cell.where[y] if y else None, cell.where[x])
        found.places.setdefault(place, []).append((cell, verdict))
    return list(maps.values())
