"""What the page size costs, whatever the question is."""

from __future__ import annotations

from fa_research.compare.cells import Cell, Entry
from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import Estimate, ratio
from fa_research.compare.figures.base import Figure, Point, chart_of, encodings, linked
from fa_research.compare.figures.theme import palette


def page_size_figure(comparison: Comparison) -> Figure | None:
    """Times along the page size, each against the best page size of its cell."""
    import altair as alt

    points = _page_points(comparison)
    if not points:
        return None
    pages = sorted({p["x"] for p in points})
    asked = comparison.question.name.endswith("page_size")
    color = alt.value(palette(["all"])["all"][0]) if asked else encodings(comparison)[0]
    shape = alt.value("circle") if asked else encodings(comparison)[1]
    along = alt.X("x:Q").title("page size (slots)").scale(type="log", base=2, nice=False, padding=14)
    base = chart_of(points).encode(
        x=along.axis(values=pages, grid=False),
        y=alt.Y("y:Q").title("from the best page size (%)"),
        color=color,
    )
    lines = base.mark_line(opacity=0.35, strokeWidth=1.5).encode(detail="group:N")
    dots = base.mark_point(filled=True, size=45, opacity=0.9).encode(
        shape=shape, href="href:N", description="description:N"
    )
    chart = alt.layer(lines, dots).properties(width=560, height=280)
    caption = "A line for each cell: how far every page size is from the one that is best there."
    return Figure("page_size", "What the page size costs", caption, chart)


def _page_points(comparison: Comparison) -> list[Point]:
    """Costs of page sizes among rows that are equal otherwise."""
    groups: dict[str, list[tuple[float, Cell, Entry, Estimate]]] = {}
    for cell in comparison.cells:
        for entry in cell.entries.values():
            keys = [key for key in entry.record.config if key.endswith("page_size")]
            if entry.estimate is None or len(keys) != 1:
                continue
            others = {key: value for key, value in cell.where.items() if key != keys[0]}
            answer = "" if comparison.question.name == keys[0] else entry.label
            member = (entry.record.config[keys[0]], cell, entry, entry.estimate)
            groups.setdefault(f"{answer} {others}", []).append(member)
    points = []
    for group, members in groups.items():
        if len({page for page, *_ in members}) < 2:
            continue
        best = (max if comparison.higher else min)((m[-1] for m in members), key=lambda found: found.value)
        for page, cell, entry, found in members:
            cost = ratio(best, found) if comparison.higher else ratio(found, best)
            points.append(
                linked(comparison, cell, entry) | {"x": page, "y": (cost.value - 1) * 100, "group": group}
            )
    return points
