"""The decision map as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import DecisionMap, decision_map, winner
from fa_research.compare.figures.base import MOST_CELLS, Figure, Point, chart_of
from fa_research.compare.figures.theme import FG, TIE, palette
from fa_research.compare.keys import text_of, title_of
from fa_research.compare.names import axis_title
from fa_research.compare.wording import excess, outcome

if TYPE_CHECKING:
    import altair as alt


def decision_figure(comparison: Comparison) -> Figure | None:
    """Who wins where, by how much."""
    drawn = decision_map(comparison.cells)
    if drawn is None or not comparison.ranked:
        return None
    rows = drawn.rows[:MOST_CELLS]
    points = [
        _place(comparison, number) | {"x": text_of(x), "y": _row_name(where)}
        for where, places in rows
        for x, number in places.items()
    ]
    shown = f" The first {len(rows)} of {len(drawn.rows)} rows." if len(rows) < len(drawn.rows) else ""
    caption = (
        "The best choice where it is surely better, and by how much the next is behind. Differences below "
        f"{max(comparison.tie, comparison.drift) * 100:.2g} % or not sure are ties; alone: no other has a number there."
        f"{shown}"
    )
    chart = _map_chart(comparison, drawn, rows, points)
    return Figure("decision", f"Which {comparison.question.title} wins where", caption, chart)


def _map_chart(comparison: Comparison, drawn: DecisionMap, rows: Sequence[Any], points: list[Point]) -> Any:
    """Coloured boxes with the winner's name and lead in each."""
    import altair as alt

    look = palette(comparison.labels)
    names = [
        label for label in [*look, "tie", "none", "not judged"] if any(p["label"] == label for p in points)
    ]
    colors = [look[label][0] if label in look else TIE for label in names]
    along, down = _axes(drawn, rows)
    base = chart_of(points).encode(x=along, y=down)
    boxes = base.mark_rect(opacity=0.42, cornerRadius=3).encode(
        color=alt.Color("label:N").scale(domain=names, range=colors).title("wins"),
        href="href:N",
        description="description:N",
    )
    who = base.mark_text(color=FG, dy=alt.expr("datum.by ? -6 : 0"), fontSize=12, fontWeight=600)
    much = base.mark_text(color=FG, dy=9, fontSize=10.5).encode(text="by:N")
    width = max(84, 14 + 7 * max(max(len(p["label"]), len(p["by"])) for p in points))
    return alt.layer(boxes, who.encode(text="label:N"), much).properties(
        width=alt.Step(width), height=alt.Step(42 if len(rows) <= 12 else 34)
    )


def _axes(drawn: DecisionMap, rows: Sequence[Any]) -> tuple[alt.X, alt.Y]:
    import altair as alt

    gap = alt.Scale(paddingInner=0.06, paddingOuter=0.03)
    along = alt.X("x:O").sort([text_of(x) for x in drawn.xs]).title(axis_title(drawn.x))
    down = alt.Y("y:O").sort([_row_name(where) for where, _ in rows])
    down = down.title(axis_title(drawn.keys[0]) if len(drawn.keys) == 1 else None)
    return (
        along.scale(gap).axis(labelAngle=0),
        down.scale(gap).axis(alt.Axis(labelLimit=420) if drawn.keys else None),
    )


def _row_name(where: dict[str, Any]) -> str:
    return text_of(next(iter(where.values()))) if len(where) == 1 else title_of(where)


def _place(comparison: Comparison, number: int) -> Point:
    """What is written into a place of the decision map."""
    cell, verdict = comparison.cells[number], comparison.verdicts[number]
    second = verdict.runner_up
    by = ""
    if verdict.is_tie and len(verdict.best) < len(verdict.costs):
        by = " = ".join(verdict.best)
        by = by if len(by) <= 16 else f"of {len(verdict.best)}"
    elif second and not verdict.is_tie:
        by = f"by {excess(verdict.costs[second]).partition(' [')[0]}"
    elif len(verdict.costs) == 1:
        by = "alone"  # the others failed here: no win to build on
    said = f"{cell.title}: {outcome(comparison, cell, verdict)}"
    return {"label": winner(verdict), "by": by, "href": f"#{comparison.anchor}-{number}", "description": said}
