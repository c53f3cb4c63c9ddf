"""A number along the context, by answer, in panels."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from fa_research.compare.cells import Entry
from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import axes
from fa_research.compare.figures.base import Figure, Point, chart_of, encodings, linked
from fa_research.compare.figures.theme import palette
from fa_research.compare.keys import title_of
from fa_research.compare.names import axis_title, quantity, words

if TYPE_CHECKING:
    import altair as alt

_MOST_PANELS = 12
_MILLISECONDS_FROM = 5000.0  # microseconds: larger times are drawn in ms
_LOGARITHMIC_FROM = 50.0  # the largest number of a panel over its smallest
_DECADES = [m * 10.0**n for n in range(-3, 9) for m in (1, 3)]  # ticks of a logarithmic axis
_GAP: Point = {"y": None, "low": None, "high": None}  # no line is drawn across what has no number


def latency_figure(comparison: Comparison) -> Figure | None:
    """The metric along the context (or the first number that varies), a panel for each combination of the rest."""
    values = [e.value for c in comparison.cells for e in c.measured.values()]
    in_ms = comparison.metric.endswith("_us") and median(values or [0]) >= _MILLISECONDS_FROM
    scale = 1e-3 if in_ms else 1.0
    title = quantity(comparison.metric).replace("(us)", "(ms)") if in_ms else quantity(comparison.metric)

    def point(entry: Entry) -> Point | None:
        found = entry.estimate
        if found is None:
            return None
        band = (None if end is None else end * scale for end in (found.p10, found.p90))
        return {"y": found.value * scale} | dict(zip(("low", "high"), band, strict=True))

    if (drawn := _series(comparison, point, title)) is None:
        return None
    chart, extent = drawn
    along = axis_title(axes(comparison.cells)[0]).partition(" (")[0]
    caption = f"Medians; bands from the 10th to the 90th percentile of the samples.{extent}"
    return Figure("latency", f"{words(comparison.metric).capitalize()} along {along}", caption, chart)


def roof_figure(comparison: Comparison) -> Figure | None:
    """The share of the roof that each row reached."""
    stem = comparison.metric.removesuffix("_us").removesuffix("_tokens_per_s")
    name = f"{stem}_roof_fraction"

    def point(entry: Entry) -> Point | None:
        value = entry.record.row.metrics.get(name)
        if entry.estimate is None or not isinstance(value, int | float):
            return None
        return {"y": value * 100, "low": None, "high": None}

    if (drawn := _series(comparison, point, "share of the roof (%)", top=100)) is None:
        return None
    chart, extent = drawn
    caption = (
        "The least time that moving the bytes or doing the multiply-adds could take, at the rates measured on the same "
        f"GPU, over the time taken.{extent}"
    )
    title = f"Share of the roof: {words(comparison.metric)}"
    return Figure("roof", title, caption, chart)


def _series(
    comparison: Comparison, point: Callable[[Entry], Point | None], title: str, top: float | None = None
) -> tuple[alt.TopLevelMixin, str] | None:
    """Lines with bands by answer, in panels, and a word on what is left out; None where no panel has two points along
    the axis."""
    import altair as alt

    x = next(iter(axes(comparison.cells)), None)
    panels = _panels(comparison, x, point) if x else {}
    if not panels or x is None:
        return None
    up = _up(panels, title, top)
    size = (560, 300) if len(panels) == 1 else (250, 180)
    charts = [
        _panel(comparison, points, axis_title(x), up)
        .properties(width=size[0], height=size[1])
        .properties(**_panel_title(name))
        for name, points in panels.items()
    ]
    extent = _extent(comparison, sum(len(_drawn(points)) for points in panels.values()))
    if len(charts) == 1:
        return charts[0], extent
    columns = 2 if len(charts) in (2, 4) else 3
    joined = alt.concat(*charts, columns=columns, bounds="flush", spacing={"row": 84, "column": 84})
    return joined.resolve_scale(color="shared", shape="shared"), extent


def _up(panels: dict[str, list[Point]], title: str, top: float | None) -> alt.Y:
    """The axis of the numbers, one for all panels; `top` is in view where it is given."""
    import altair as alt

    if top is not None:
        highest = max(p["y"] for points in panels.values() for p in _drawn(points))
        scale = alt.Scale(domain=[0, max(top, highest + 3)], nice=False)  # room for a mark on the roof
    elif max(map(_spread, panels.values())) >= _LOGARITHMIC_FROM:
        scale = alt.Scale(type="log", nice=True)
    else:
        scale = alt.Scale(zero=True, nice=True)
    up = alt.Y("y:Q").title(title).scale(scale).axis(minExtent=48, tickCount=5)
    return up.axis(minExtent=48, values=_DECADES) if scale["type"] == "log" else up


def _drawn(points: list[Point]) -> list[Point]:
    """The points that have a number; the others are gaps in their lines."""
    return [p for p in points if p["y"] is not None]


def _spread(points: list[Point]) -> float:
    """The largest number over the smallest; 1 where one is not positive and no logarithm can be drawn."""
    values = [p["y"] for p in _drawn(points)]
    return max(values) / min(values) if min(values) > 0 else 1.0


def _panel_title(name: str) -> dict[str, Any]:
    """The title as a property, in lines that fit above a panel; none where there is nothing to say."""
    import altair as alt

    lines, line = [], ""
    for part in name.split(", "):
        if line and len(line) + len(part) > 36:
            lines.append(line + ",")
            line = part
        else:
            line = f"{line}, {part}" if line else part
    title = alt.TitleParams([*lines, line], fontSize=12, offset=8, frame="group")
    return {"title": title} if name else {}


def _panel(comparison: Comparison, points: list[Point], x_title: str, up: alt.Y) -> Any:
    import altair as alt

    along = _along(sorted({p["x"] for p in points}), x_title)
    layers = []
    # A layer for each answer: a scale of fills or dashes would be merged into the legend of the points.
    for label, (tone, _, dashes) in palette(comparison.labels).items():
        mine = chart_of([p for p in points if p["label"] == label]).encode(x=along)
        band = (
            mine.mark_area(opacity=0.18, color=tone)
            .encode(y=up, y2="high:Q")
            .transform_calculate(y="datum.low")
        )
        layers += [band, mine.mark_line(strokeWidth=1.8, color=tone, strokeDash=dashes).encode(y=up)]
    color, shape = encodings(comparison)
    # hollow, so that answers on top of each other can all be seen
    dots = chart_of(_drawn(points)).mark_point(filled=False, size=60, strokeWidth=1.8, opacity=1)
    dots = dots.encode(x=along, y=up, color=color, shape=shape, href="href:N", description="description:N")
    return alt.layer(*layers, dots)


def _along(xs: list[float], title: str) -> alt.X:
    """The axis of these places, logarithmic where they span a factor of four."""
    import altair as alt

    label = (
        "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : format(datum.value, ',')"
    )
    along = alt.X("x:Q").title(title)
    if xs[0] > 0 and xs[-1] >= 4 * xs[0]:
        along = along.scale(type="log", base=2, nice=False, padding=12)
    else:
        along = along.scale(nice=False, padding=12)
    return along.axis(values=xs if len(xs) <= 9 else alt.Undefined, labelExpr=label, grid=False)


def _panels(comparison: Comparison, x: str, point: Callable[[Entry], Point | None]) -> dict[str, list[Point]]:
    """Points by panel; panels that have one place along x are left out, and those past the first dozen."""
    found: dict[str, tuple[dict[str, Any], list[Point]]] = {}
    for cell in comparison.cells:
        at = cell.where[x]
        if isinstance(at, bool) or not isinstance(at, int | float):
            return {}
        where = {key: value for key, value in cell.where.items() if key != x}
        _, points = found.setdefault(repr(where), (where, []))
        for entry in cell.entries.values():
            points.append(linked(comparison, cell, entry) | {"x": at} | (point(entry) or _GAP))
    kept = [panel for panel in found.values() if len({p["x"] for p in _drawn(panel[1])}) > 1][:_MOST_PANELS]
    differing = [k for k in (kept[0][0] if kept else ()) if len({repr(where[k]) for where, _ in kept}) > 1]
    return {title_of({key: where[key] for key in differing}): points for where, points in kept}


def _extent(comparison: Comparison, drawn: int) -> str:
    """A word on the cells that are not in a figure of so many points."""
    points = sum(len(cell.measured) for cell in comparison.cells)
    return "" if drawn >= points else f" {drawn} of {points} numbers; the others are in the table."
