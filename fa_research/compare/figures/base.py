"""What figures share: links to rows, the look of the answers, the axis of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fa_research.compare.cells import Cell, Entry
from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.theme import palette
from fa_research.compare.names import number

if TYPE_CHECKING:
    import altair as alt

MOST_CELLS = 48  # rows of one figure
_COST_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 900, 2900, 9900, 29900, 99900)  # percent; 200 is 3x
Point = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Figure:
    """A drawing.

    Attributes:
        name: of its file.
        title, caption: what it shows and how to read it.
    """

    name: str
    title: str
    caption: str
    chart: alt.TopLevelMixin


def chart_of(points: Sequence[Point]) -> alt.Chart:
    """A chart of these points. Altair copies a chart at every step, down to each value of a list; a tuple it leaves."""
    import altair as alt

    return alt.Chart(alt.Data(values=tuple(points)))


def linked(comparison: Comparison, cell: Cell, entry: Entry) -> Point:
    """What every point has: its answer, the anchor of its row, and words for it."""
    row = comparison.number_of(entry.record)
    value = "" if entry.estimate is None else number(entry.estimate.value)
    where = f" at {cell.title}" if cell.where else ""
    said = f"{entry.label}: {value}{where} (row {row})"
    return {"label": entry.label, "href": f"#row-{row}", "description": said}


def encodings(comparison: Comparison) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of each answer."""
    return look_of(comparison.labels, comparison.question.title)


def look_of(labels: Sequence[str], title: str) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of these labels, with one legend."""
    import altair as alt

    look = palette(labels)
    domain = list(look)
    colors, shapes, _ = (list(column) for column in zip(*look.values(), strict=True))
    return (
        alt.Color("label:N").scale(domain=domain, range=colors).title(title),
        alt.Shape("label:N").scale(domain=domain, range=shapes).title(title),
    )


def cost_point(value: float, low: float | None, high: float | None) -> Point:
    """Costs as percentages above the best."""
    return {"x": (value - 1) * 100, "low": low and (low - 1) * 100, "high": high and (high - 1) * 100}


def cost_axis(bottom: float, top: float) -> alt.X:
    """Percent; above 10 % an axis that is linear near zero and logarithmic far from it, in multiples from 3x on."""
    import altair as alt

    along = alt.X("x:Q").title("from the best of the cell")
    label = (
        "datum.value >= 200 ? format(datum.value / 100 + 1, '~s') + 'x' : format(datum.value, '~g') + ' %'"
    )
    if top <= 10:
        return along.scale(nice=True, padding=8).axis(labelExpr=label, tickCount=6)
    ticks = [t for t in (-50, -20, -5, -1, *_COST_TICKS) if bottom <= t <= top]
    scale = alt.Scale(type="symlog", constant=1, domain=[bottom, top], nice=False, padding=8)
    return along.scale(scale).axis(values=ticks, labelExpr=label)
