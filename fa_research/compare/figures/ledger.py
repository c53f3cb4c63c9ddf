"""What a step is made of: the ledger's parts as one bar a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure, Point, chart_of, linked
from fa_research.compare.figures.theme import LIGHT, MUTED
from fa_research.compare.keys import title_of
from fa_research.compare.names import number, words

PARTS = ("host_plan", "metadata", "kv_write", "attention", "combine", "model", "sampling", "gap")
# Neighbours in a bar have to differ most: the order of the palette's colours, one for each part.
_COLORS = dict(zip(PARTS, (LIGHT[i] for i in (3, 4, 2, 0, 5, 7, 1, 6)), strict=True))
_MOST_BARS = 30
_MOST_APART = 6
_DIFFERS = 0.02  # what the ledger's sum may be off before both are shown


def ledger_figures(comparison: Comparison) -> list[Figure]:
    """One for each timed unit that rows have the parts of."""
    units: dict[str, None] = {}
    for cell in comparison.cells:
        for entry in cell.entries.values():
            names = (name.partition("_ledger_") for name in entry.record.row.metrics)
            units |= dict.fromkeys(unit for unit, found, part in names if found and part.endswith("_us"))
    return [made for unit in units if (made := _bars(comparison, unit)) is not None]


def _bars(comparison: Comparison, unit: str) -> Figure | None:
    import altair as alt

    bars = _read(comparison, unit)
    if not bars:
        return None
    sums = [bar.sum for bar in bars]
    shares = max(sums) > _MOST_APART * min(sums)  # else the short ones cannot be read
    scale, symbol = (1e-3, "ms") if max(sums) >= 5000 else (1.0, "us")  # one for axis, labels and tooltips
    axis = "share of the sum (%)" if shares else f"{words(f'{unit}_us')} ({symbol})"
    said = [_Said(scale, symbol, 100 / bar.sum if shares else scale) for bar in bars]
    points = [p for bar, unit_ in zip(bars, said, strict=True) for p in bar.pieces(unit_)]
    ends = [bar.end(unit_) for bar, unit_ in zip(bars, said, strict=True)]
    parts = [part for part in PARTS if any(p["label"] == _name(part) for p in points)]
    colors = alt.Scale(domain=[_name(p) for p in parts], range=[_COLORS[p] for p in parts])
    top = max(e["x"] for e in ends)
    along = alt.X("x:Q").title(axis).scale(domain=[0, top * 1.24], nice=False)
    along = along.axis(values=[0, 20, 40, 60, 80, 100] if shares else alt.Undefined)
    down = alt.Y("bar:N").sort(None).title(None).axis(labelLimit=420)
    boxes = chart_of(points).mark_bar()
    color = alt.Color("label:N").scale(colors).title(None)
    boxes = boxes.encode(x=along, x2="end:Q", y=down, color=color, href="href:N", description="description:N")
    text = chart_of(ends).mark_text(align="left", dx=6, color=MUTED, fontSize=11)
    chart = alt.layer(boxes, text.encode(x=along, y=down, text="text:N"))
    chart = chart.properties(width=560, height=alt.Step(22 if len(bars) > 8 else 28))
    measured = sum(len(cell.measured) for cell in comparison.cells)
    shown = f" {len(bars)} of {measured} rows." if len(bars) < measured else ""
    caption = (
        f"The parts of a {words(f'{unit}_us')} at the median. Beside a bar the sum of its parts, and in brackets the "
        f"time of the whole where it differs by more than {_DIFFERS * 100:g} %.{shown}"
    )
    return Figure(f"ledger_{unit}", f"Time breakdown of the {words(f'{unit}_us')}", caption, chart)


@dataclass(frozen=True)
class _Said:
    """How times are said: the factor to and the symbol of their unit, and the factor to what is drawn."""

    factor: float
    symbol: str
    drawn: float

    def time(self, microseconds: float) -> str:
        return f"{number(microseconds * self.factor)} {self.symbol}"


@dataclass(frozen=True)
class _Bar:
    """A row: its name, link, microseconds by part, and the time of the whole."""

    name: str
    link: Point
    costs: dict[str, float]
    whole: Any

    @property
    def sum(self) -> float:
        return sum(self.costs.values())

    def pieces(self, unit: _Said) -> list[Point]:
        found, at = [], 0.0
        for part, cost in self.costs.items():
            share = f"{cost / self.sum * 100:.1f} % of {unit.time(self.sum)}"
            said = {"description": f"{self.name}: {_name(part)} {unit.time(cost)}, {share}"}
            ends = {"x": at * unit.drawn, "end": (at + cost) * unit.drawn}
            place = {"bar": self.name, "label": _name(part), **ends}
            found.append(self.link | place | said)
            at += cost
        return found

    def end(self, unit: _Said) -> Point:
        text, whole = unit.time(self.sum), self.whole
        if isinstance(whole, int | float) and abs(whole - self.sum) > _DIFFERS * self.sum:
            text += f" (whole {unit.time(whole)})"
        return {"bar": self.name, "x": self.sum * unit.drawn, "text": text}


def _read(comparison: Comparison, unit: str) -> list[_Bar]:
    """The bars from the top; of many cells some, evenly."""
    cells = []
    for cell in comparison.cells:
        bars = []
        for label in comparison.labels:
            if label not in cell.measured:
                continue
            entry = cell.entries[label]
            metrics = entry.record.row.metrics
            costs = {part: metrics.get(f"{unit}_ledger_{part}_us") for part in PARTS}
            kept = {p: float(c) for p, c in costs.items() if isinstance(c, int | float) and c >= 0}
            if sum(kept.values()) > 0:
                key = comparison.question.title.rpartition(".")[2]
                answer = label if key == "backend" else f"{key}={label}"
                name = ", ".join(filter(None, [answer, title_of(cell.where)]))
                bars.append(_Bar(name, linked(comparison, cell, entry), kept, metrics.get(f"{unit}_us")))
        cells += [bars] if bars else []
    fits = max(1, _MOST_BARS * len(cells) // max(1, sum(map(len, cells))))
    step = max(1.0, len(cells) / fits)
    return [bar for place in range(min(fits, len(cells))) for bar in cells[int(place * step)]]


def _name(part: str) -> str:
    return part.replace("_", " ").replace("kv", "KV")
