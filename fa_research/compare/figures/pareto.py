"""Quality against time, of answers that change the result."""

from __future__ import annotations

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure, Point, chart_of, encodings, linked
from fa_research.compare.figures.theme import MUTED
from fa_research.compare.names import number, quantity, words
from fa_research.compare.no_verdict import banner, is_by_quality
from fa_research.compare.quality import measure_of, pareto, tradeoffs

_MOST_FRONTS = 12


def pareto_figure(comparison: Comparison) -> Figure | None:
    """Every answer's quality against its time, a line through the answers of a cell that no other beats in both; None
    where the answers do not change the result, or no two in a cell have a quality."""
    import altair as alt

    if not comparison.weighs_quality:
        return None
    cells = [(cell, tradeoffs(cell)) for cell in comparison.cells]
    cells = [(cell, points) for cell, points in cells if len(points) > 1]
    name = measure_of([point for _, points in cells for point in points])
    if name is None:
        return None
    dots: list[Point] = []
    fronts: list[Point] = []
    for cell, points in cells[:_MOST_FRONTS]:
        best = pareto(points, name, higher=comparison.higher)
        for point in points:
            made = linked(comparison, cell, cell.entries[point.label])
            made["description"] += f", {words(name)} {number(point.quality[name])}"
            dots.append(made | {"x": point.value, "y": point.quality[name]})
        fronts += [
            {"x": p.value, "y": p.quality[name], "cell": cell.title} for p in best if is_by_quality(cell)
        ]
    color, shape = encodings(comparison)
    along = alt.X("x:Q").title(quantity(comparison.metric)).scale(zero=False, padding=20)
    up = alt.Y("y:Q").title(words(name)).scale(zero=False, padding=20)
    line = chart_of(fronts).mark_line(color=MUTED, strokeDash=[4, 3], opacity=0.8)
    line = line.encode(x=along, y=up, detail="cell:N", order="x:Q")
    marks = chart_of(dots).mark_point(filled=True, size=80, opacity=1)
    marks = marks.encode(x=along, y=up, color=color, shape=shape, href="href:N", description="description:N")
    chart = alt.layer(*([line] if fronts else []), marks).properties(width=560, height=300)
    both = not comparison.higher and name == "bits_per_byte"
    less = "Less is better in both" if both else "Each has its own direction"
    shown = f" The first {_MOST_FRONTS} of {len(cells)} cells." if len(cells) > _MOST_FRONTS else ""
    front = "; dashed: the answers of a cell that no other beats in both (Pareto)" if fronts else ""
    caption = f"{less}{front}.{shown} "
    said = banner(comparison)
    return Figure("pareto", "Quality against time", f"{caption}{said[:1].upper()}{said[1:]}.", chart)
