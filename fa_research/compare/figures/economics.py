"""What a page size gives and takes: requests that fit against the rate of tokens, waste and prefix hits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure, Point, chart_of, linked, look_of
from fa_research.compare.figures.theme import FG, LIGHT, MUTED
from fa_research.compare.names import number

if TYPE_CHECKING:
    import altair as alt

PAGE_SIZE = "kv.page_size"
CAPACITY, RATE = "trace_live_requests_mean", "trace_tokens_per_s"
_SHARES = {
    "trace_waste_fraction_mean": "used slots without a token (%)",
    "trace_prefix_hit_fraction": "prompt tokens found in the cache (%)",
}


def trace_figures(comparison: Comparison) -> list[Figure]:
    """The Pareto front of page sizes, and what moves them on it; [] where no row replayed a trace."""
    found = [_pareto(comparison), _shares(comparison)]
    return [figure for figure in found if figure is not None]


def _number(metrics: dict[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) and value == value else None


def _pareto(comparison: Comparison) -> Figure | None:
    points = _pareto_points(comparison)
    if len(points) < 2:
        return None
    asked = comparison.question.name == PAGE_SIZE
    caption = "Up and to the right is better; along the dashed line no other choice is better in both."
    if not asked:
        caption += " Figures at the points are page sizes."
    chart = _pareto_chart(comparison, points, name_pages=not asked)
    return Figure("pareto", "Capacity and throughput of page sizes", caption, chart)


def _pareto_points(comparison: Comparison) -> list[Point]:
    points: list[Point] = []
    for cell in comparison.cells:
        for entry in cell.entries.values():
            x, y = (_number(entry.record.row.metrics, name) for name in (CAPACITY, RATE))
            if x is not None and y is not None and entry.estimate is not None:
                page = entry.record.config.get(PAGE_SIZE)
                point = linked(comparison, cell, entry) | {"x": x, "y": y, "page": str(page)}
                others = {key: value for key, value in cell.where.items() if key != PAGE_SIZE}
                point["group"] = repr(others)  # one trace, one model: what can be chosen between
                point["description"] += f": page size {page}, {number(x)} requests, {number(y)} tokens/s"
                points.append(point)
    return points


def _pareto_chart(comparison: Comparison, points: list[Point], name_pages: bool) -> alt.LayerChart:
    """The points by answer, and each group's front as a line below them."""
    import altair as alt

    color, shape = look_of(comparison.labels, comparison.question.title)
    along = alt.X("x:Q").title("requests in the pool at once, mean").scale(zero=False, padding=24)
    up = alt.Y("y:Q").title("tokens per second, estimated").scale(zero=False, padding=24)
    groups = dict.fromkeys(p["group"] for p in points)
    best = [p for group in groups for p in front([p for p in points if p["group"] == group])]
    line = chart_of(best).mark_line(color=MUTED, strokeDash=[4, 3], interpolate="step-before")
    base = chart_of(points).encode(x=along, y=up)
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        color=color, shape=shape, href="href:N", description="description:N"
    )
    layers: list[Any] = [line.encode(x=along, y=up, detail="group:N"), dots]
    if name_pages:
        layers.append(base.mark_text(color=FG, dy=-11, fontSize=11).encode(text="page:N"))
    return alt.layer(*layers).properties(width=560, height=320)


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in both, by x. Larger is better."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p["x"], -p["y"])):
        if not kept or point["y"] > kept[-1]["y"]:
            kept.append(point)
    return kept[::-1]


def _shares(comparison: Comparison) -> Figure | None:
    """Waste and hits along the page size."""
    import altair as alt

    charts = []
    for name, title in _SHARES.items():
        points = _share_points(comparison, name)
        if len({p["x"] for p in points}) > 1:
            charts.append(_share_chart(points, title))
    if not charts:
        return None
    chart = alt.concat(*charts, columns=2, spacing=64) if len(charts) > 1 else charts[0]
    return Figure("trace", "What a page size wastes and finds", "Of the replayed trace.", chart)


def _share_points(comparison: Comparison, name: str) -> list[Point]:
    points: dict[tuple[Any, float], Point] = {}
    for cell in comparison.cells:
        for entry in cell.entries.values():
            share, page = _number(entry.record.row.metrics, name), entry.record.config.get(PAGE_SIZE)
            if share is None or not isinstance(page, int):
                continue
            y = share * 100
            point = linked(comparison, cell, entry) | {"x": page, "y": y}
            points[page, y] = point | {"description": f"page size {page}: {y:.3g} %"}
    return list(points.values())


def _share_chart(points: list[Point], title: str) -> alt.Chart:
    import altair as alt

    pages = sorted({p["x"] for p in points})
    along = alt.X("x:Q").title("page size (slots)").scale(type="log", base=2, nice=False, padding=14)
    base = chart_of(points)
    dots = base.mark_point(filled=True, size=60, opacity=1, color=LIGHT[0]).encode(
        x=along.axis(values=pages, grid=False),
        y=alt.Y("y:Q").title(title).scale(zero=True),
        href="href:N",
        description="description:N",
    )
    return dots.properties(width=240, height=200)
