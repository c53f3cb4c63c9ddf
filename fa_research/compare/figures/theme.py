"""Colours and type of figures. A figure is drawn in the light colours; on the page each is a CSS variable, which has a
light and a dark value.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; answers differ in shape and
dash too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8528f", "#b07a00", "#3a9bd1", "#6f5fc6", "#7d6148")
DARK = ("#58b4f0", "#ff8f4d", "#35d0a0", "#f0a3d0", "#f0b93a", "#9bd4f7", "#b3a6ff", "#cfae90")
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 2], [10, 4], [3, 3, 1, 3], [1, 3])
# name: light, dark
TONES = {
    "fg": ("#1f2328", "#e6e8eb"),
    "muted": ("#5b636d", "#a0a8b2"),
    "grid": ("#dfe3e8", "#343a42"),
    "tie": ("#9aa1aa", "#7b838d"),
}
FG, MUTED, GRID, TIE = (tone[0] for tone in TONES.values())


def palette(labels: Sequence[str]) -> dict[str, tuple[str, str, list[int]]]:
    """Colour, shape and dash of each answer. More answers than colours share them, but not colour and shape both."""
    n = len(LIGHT)
    return {
        label: (LIGHT[i % n], SHAPES[(i + i // n) % len(SHAPES)], list(DASHES[(i + i // n) % len(DASHES)]))
        for i, label in enumerate(labels)
    }


def config() -> dict[str, Any]:
    """The Vega-Lite config of every figure."""
    axis = {
        "labelColor": MUTED,
        "titleColor": FG,
        "gridColor": GRID,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "titlePadding": 8,
    }
    return {
        "background": "transparent",
        "font": "DejaVu Sans, Liberation Sans, Helvetica, Arial, sans-serif",
        "padding": 6,
        "title": {"color": FG, "subtitleColor": MUTED, "fontSize": 15, "anchor": "start", "offset": 14},
        "axis": axis,
        "legend": {
            "labelColor": FG,
            "titleColor": FG,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 300,
            "symbolOpacity": 1,
        },
        "view": {"stroke": GRID},
        "concat": {"spacing": 26},
    }


def css_variables(dark: bool) -> str:
    """The colours as CSS declarations."""
    colors = DARK if dark else LIGHT
    tones = {name: tone[int(dark)] for name, tone in TONES.items()}
    named = {f"c{i}": color for i, color in enumerate(colors)} | tones
    return " ".join(f"--{name}: {color};" for name, color in named.items())


def to_variables() -> dict[str, str]:
    """Colours of figures by the CSS variables that stand for them on the page."""
    found = {color: f"var(--c{i})" for i, color in enumerate(LIGHT)}
    return found | {tone[0]: f"var(--{name})" for name, tone in TONES.items()}
