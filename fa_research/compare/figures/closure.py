"""How far predictions from kernel rows are off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa_research.compare.closure import VARIANTS, Closed, Closure
from fa_research.compare.figures.base import MOST_CELLS, Figure, Point, chart_of, look_of
from fa_research.compare.figures.theme import MUTED
from fa_research.compare.keys import title_of
from fa_research.compare.names import number

if TYPE_CHECKING:
    import altair as alt


def closure_figure(closure: Closure) -> Figure:
    """Each cell's error by each way to predict it."""
    cells = closure.cells[:MOST_CELLS]
    shown = (
        f" The first {len(cells)} of {len(closure.cells)} cells." if len(cells) < len(closure.cells) else ""
    )
    caption = f"Left of zero the step took longer than predicted.{shown}"
    return Figure("closure", "A model's step predicted from its kernels", caption, _chart(cells))


def _points(cells: list[Closed]) -> list[Point]:
    points: list[Point] = []
    for cell in cells:
        name = title_of(cell.where)
        for variant, predicted in cell.predicted.items():
            error = (predicted / cell.measured - 1) * 100
            said = f"{name}: {number(predicted)} us by {variant}, {number(cell.measured)} us measured"
            points.append({"cell": name, "label": variant, "x": error, "description": said})
    return points


def _chart(cells: list[Closed]) -> alt.LayerChart:
    import altair as alt

    points = _points(cells)
    color, shape = look_of([v for v in VARIANTS if any(p["label"] == v for p in points)], "the rest from")
    ends = [0.0, *(p["x"] for p in points)]
    pad = (max(ends) - min(ends)) * 0.05 or 1.0
    along = alt.X("x:Q").title("predicted over measured (%)")
    along = along.scale(domain=[min(ends) - pad, max(ends) + pad], nice=False)
    down = alt.Y("cell:N").sort([title_of(cell.where) for cell in cells]).title(None)
    dots = chart_of(points).mark_point(filled=False, size=70, strokeWidth=2, opacity=1)
    dots = dots.encode(
        x=along,
        y=down.axis(labelLimit=420, grid=True),
        color=color,
        shape=shape,
        description="description:N",
    )
    zero = chart_of([{"x": 0.0}]).mark_rule(color=MUTED, strokeWidth=1.5).encode(x=along)
    return alt.layer(zero, dots).properties(width=520, height=alt.Step(22 if len(cells) > 8 else 28))
