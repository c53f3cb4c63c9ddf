"""What the page size costs, whatever the question is."""

from __future__ import annotations

from fa_research.compare.cells import Cell, Entry
from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import Estimate, ratio
from fa_research.compare.figures.base import Figure, Point, chart_of, linked, look_of
from fa_research.compare.keys import order_of, short


def page_size_figure(comparison: Comparison) -> Figure | None:
    """Times along the page size, each against the best page size of its cell."""
    import altair as alt

    points = _page_points(comparison)
    if not points or any(cell.unjudged for cell in comparison.cells):
        return None
    pages = sorted({p["x"] for p in points})
    labels, title = _labels(comparison)
    color, shape = look_of(labels, title)
    if len(labels) == 1:
        color, shape = color.legend(None), shape.legend(None)
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


def _asked(comparison: Comparison) -> bool:
    return comparison.question.name.endswith("page_size")


def _named_by(comparison: Comparison) -> str | None:
    """Where the page size itself is asked for: the key with names for values, such as the backend, that tells lines
    apart; None where there is none."""
    where = comparison.cells[0].where if comparison.cells else {}
    return next((key for key, value in where.items() if isinstance(value, str)), None)


def _labels(comparison: Comparison) -> tuple[list[str], str]:
    """What lines are named after, and the title of their legend."""
    if not _asked(comparison):
        return list(comparison.labels), comparison.question.title
    if (key := _named_by(comparison)) is None:
        return [""], ""
    return sorted({str(cell.where[key]) for cell in comparison.cells}, key=order_of), short(key, [])


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
    named_by = _named_by(comparison) if _asked(comparison) else None
    points = []
    for group, members in groups.items():
        if len({page for page, *_ in members}) < 2:
            continue
        best = (max if comparison.higher else min)((m[-1] for m in members), key=lambda found: found.value)
        for page, cell, entry, found in members:
            cost = ratio(best, found) if comparison.higher else ratio(found, best)
            point = linked(comparison, cell, entry) | {"x": page, "y": (cost.value - 1) * 100, "group": group}
            if _asked(comparison):
                point["label"] = "" if named_by is None else str(cell.where[named_by])
            points.append(point)
    return points
