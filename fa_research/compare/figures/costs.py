"""How far answers are from the best: in each cell, and one for all cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import (
    MOST_CELLS,
    Figure,
    Point,
    chart_of,
    cost_axis,
    cost_point,
    encodings,
    linked,
)
from fa_research.compare.figures.theme import FG, MUTED
from fa_research.compare.verdicts import Regret
from fa_research.compare.wording import excess

if TYPE_CHECKING:
    import altair as alt


def cost_figure(comparison: Comparison) -> Figure | None:
    """Every answer's cost against the best of its cell, with its interval."""
    points = _cost_points(comparison)
    if not points or not comparison.ranked:
        return None
    total = len(comparison.cells)
    drawn = min(total, MOST_CELLS)
    shown = f" The first {drawn} of {total} cells." if drawn < total else ""
    caption = f"The best median of each cell stands at 0. Bars are 95 % intervals of the ratio.{shown}"
    chart = _cost_chart(comparison, points, row_height=19 if drawn > 8 else 26)
    return Figure("cost", "How far each is from the best of its cell", caption, chart)


def _cost_points(comparison: Comparison) -> list[Point]:
    cells = list(zip(comparison.cells, comparison.verdicts, strict=True))[:MOST_CELLS]
    points = []
    for place, (cell, verdict) in enumerate(cells):
        if len(verdict.costs) < 2:  # nothing to be far from
            continue
        for label, cost in verdict.costs.items():
            point = linked(comparison, cell, cell.entries[label])
            point["description"] += f", {excess(cost)} from the best"
            title = cell.title or "all"
            points.append(
                point | {"cell": title, "place": place, **cost_point(cost.value, cost.low, cost.high)}
            )
    return points


def _cost_chart(comparison: Comparison, points: list[Point], row_height: int) -> alt.LayerChart:
    import altair as alt

    ends = [p[end] for p in points for end in ("x", "low", "high") if p[end] is not None]
    along = cost_axis(min(ends), max(ends))
    down = alt.Y("cell:N").sort(None).title(None).axis(labelLimit=420, grid=True)
    color, shape = encodings(comparison)
    base = chart_of(points).encode(y=down, color=color)
    rules = base.mark_rule(strokeWidth=2, opacity=0.8).encode(x=alt.X("low:Q"), x2="high:Q")
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=along, shape=shape, href="href:N", description="description:N"
    )
    return alt.layer(rules, dots).properties(width=520, height=alt.Step(row_height))


def regret_figure(comparison: Comparison) -> Figure | None:
    """For each answer: its cost in every cell, and the geometric mean."""
    found, count = comparison.regrets
    if count < 2:
        return None
    points = []
    for cell, verdict in zip(comparison.cells, comparison.verdicts, strict=True):
        if {regret.label for regret in found} <= set(cell.entries):
            for label, cost in verdict.costs.items():
                points.append(
                    linked(comparison, cell, cell.entries[label]) | cost_point(cost.value, None, None)
                )
    chart = _regret_chart(comparison, points, found)
    caption = f"What one choice everywhere costs: a tick for each of {count} cells, a diamond for their geometric mean."
    return Figure("regret", "Regret of a single choice", caption, chart)


def _regret_chart(comparison: Comparison, points: list[Point], found: Sequence[Regret]) -> alt.LayerChart:
    """Ticks at `points`, and each answer's mean in words."""
    import altair as alt

    means = [
        {"label": r.label, "text": f"mean {excess(r.mean).partition(' [')[0]}"}
        | cost_point(r.mean.value, r.mean.low, r.mean.high)
        for r in found
    ]
    order = [r.label for r in found]
    down = alt.Y("label:N").sort(order).title(comparison.question.title)
    color, _ = encodings(comparison)
    color = color.legend(None)
    ticks = chart_of(points).mark_tick(thickness=2, size=20, opacity=0.75)
    along = cost_axis(0.0, 1.12 * max(p["x"] for p in points))  # room for the words at a mean
    ticks = ticks.encode(x=along, y=down, color=color, href="href:N", description="description:N")
    base = chart_of(means).encode(x=along, y=down)
    dots = base.mark_point(filled=True, size=110, shape="diamond", color=FG, opacity=1)
    text = base.mark_text(color=MUTED, align="left", dx=9, dy=-18, fontSize=11).encode(text="text:N")
    return alt.layer(ticks, dots, text).properties(width=520, height=alt.Step(52))
