"""The roofline: operations per byte against the rate reached, below the roof measured on the same GPU.

Williams, Waterman, Patterson: "Roofline: An Insightful Visual Performance Model" (2009).
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, TypeGuard

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure, Point, chart_of, linked, look_of
from fa_research.compare.figures.theme import MUTED
from fa_research.compare.names import number, words

if TYPE_CHECKING:
    import altair as alt

_ROOF = ("roof_GB_per_s", "roof_TFLOP_per_s")


def roofline_figures(comparison: Comparison) -> list[Figure]:
    """One for each thing that rows have both rates of: the attention alone, a decode step, an extend pass."""
    stems: dict[str, None] = {}
    for cell in comparison.cells:
        for entry in cell.entries.values():
            names = entry.record.row.metrics
            rates = [n.removesuffix("_GB_per_s") for n in names if n.endswith("_GB_per_s")]
            stems |= dict.fromkeys(
                stem for stem in rates if stem != "roof" and f"{stem}_TFLOP_per_s" in names
            )
    return [made for stem in stems if (made := _roofline(comparison, stem)) is not None]


def _roofline(comparison: Comparison, stem: str) -> Figure | None:
    points, roofs = _points(comparison, stem)
    if not points or not roofs:
        return None
    roof = (median(r[0] for r in roofs), median(r[1] for r in roofs))
    ridge = roof[1] * 1e3 / roof[0]
    caption = (
        f"Operations and bytes that cannot be avoided, each counted once. The roof was measured on the same GPU: "
        f"{number(roof[0])} GB/s of memory traffic, {number(roof[1])} TFLOP/s of matrix products, which meet at "
        f"{ridge:.0f} FLOP per byte."
    )
    chart = _chart(comparison, points, roof, ridge)
    return Figure(f"roofline_{stem}", f"Roofline: {words(f'{stem}_us')}", caption, chart)


def _chart(
    comparison: Comparison, points: list[Point], roof: tuple[float, float], ridge: float
) -> alt.LayerChart:
    """Rows below the roof (GB/s, TFLOP/s), which bends at `ridge` FLOP per byte."""
    import altair as alt

    color, shape = look_of(comparison.labels, comparison.question.title)
    across, high = [p["x"] for p in points], roof[1] * 1.5
    ends = (min(across) / 1.6, max(max(across), ridge) * 1.6)
    line = [{"x": x, "y": min(roof[0] * x / 1e3, roof[1])} for x in (ends[0], ridge, ends[1])]
    low = min(min(p["y"] for p in points) / 1.6, line[0]["y"])
    along = _axis(alt.X("x:Q"), "operational intensity (FLOP per byte)", *ends)
    up = _axis(alt.Y("y:Q"), "reached (TFLOP/s)", low, high)
    drawn = chart_of(line).mark_line(color=MUTED, strokeWidth=2).encode(x=along, y=up)
    name = [{"x": ends[1], "y": roof[1], "text": f"{number(roof[1])} TFLOP/s"}]
    named = (
        chart_of(name)
        .mark_text(color=MUTED, align="right", dy=-8, fontSize=11)
        .encode(x=along, y=up, text="text:N")
    )
    dots = chart_of(points).mark_point(filled=False, size=60, strokeWidth=1.8, opacity=1)
    dots = dots.encode(x=along, y=up, color=color, shape=shape, href="href:N", description="description:N")
    return alt.layer(drawn, named, dots).properties(width=560, height=320)


def _axis(channel: Any, title: str, low: float, high: float) -> Any:
    """A logarithmic axis with a line for each power of ten, and for 2 and 5 of them where that leaves few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    values = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    scale = {"type": "log", "nice": False, "domain": [low, high]}
    return channel.title(title).scale(**scale).axis(values=values, format="~g")


def _points(comparison: Comparison, stem: str) -> tuple[list[Point], list[tuple[float, float]]]:
    points: list[Point] = []
    roofs: list[tuple[float, float]] = []
    for cell in comparison.cells:
        for entry in cell.entries.values():
            metrics = entry.record.row.metrics
            bytes_, flops = metrics.get(f"{stem}_GB_per_s"), metrics.get(f"{stem}_TFLOP_per_s")
            if entry.estimate is None or not (_is_rate(bytes_) and _is_rate(flops)):
                continue
            point = linked(comparison, cell, entry) | {"x": flops * 1e3 / bytes_, "y": flops}
            point["description"] += f", {number(bytes_)} GB/s, {number(flops)} TFLOP/s"
            points.append(point)
            if all(_is_rate(metrics.get(name)) for name in _ROOF):
                roofs.append((metrics[_ROOF[0]], metrics[_ROOF[1]]))
    return points, roofs


def _is_rate(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
