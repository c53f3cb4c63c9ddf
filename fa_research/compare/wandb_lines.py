"""A sweep's numbers as lines that W&B draws: along the context (or the first number that varies), one for each answer.

A cell's run has one number, which is no line, and W&B draws no line through several runs. So the sweep's run logs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import axes
from fa_research.compare.keys import short, title_of

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.]+")  # W&B queries choke on other characters


@dataclass
class Lines:
    """Lines with one x axis.

    Attributes:
        axis: the metric that is the x axis, `axis/context_len`.
        panels: names of lines that belong in one panel, by the panel's title.
        points: x, and the values of the lines there.
    """

    axis: str
    panels: dict[str, list[str]] = field(default_factory=dict)
    points: dict[float, dict[str, float]] = field(default_factory=dict)


def lines_of(comparison: Comparison) -> Lines | None:
    """None where no number varies between the cells. Names are `along_context_len/decode_step_us/batch_size_1/fa3`."""
    keys = axes(comparison.cells)
    if not keys or not all(_is_number(cell.where[keys[0]]) for cell in comparison.cells):
        return None
    x, *rest = keys
    along = in_name(short(x, keys))
    made = Lines(f"axis/{along}")
    for cell in comparison.cells:
        where = title_of({key: cell.where[key] for key in rest})
        title = ", ".join(filter(None, (comparison.metric, where)))
        for label, number in cell.measured.items():
            line = "/".join(
                filter(None, (f"along_{along}", comparison.metric, in_name(where), in_name(label)))
            )
            made.panels.setdefault(title, [])
            if line not in made.panels[title]:
                made.panels[title].append(line)
            made.points.setdefault(cell.where[x], {})[line] = number.value
    made.points = dict(sorted(made.points.items()))
    return made if len(made.points) > 1 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def in_name(text: str) -> str:
    """A text as part of a metric's name."""
    return _NOT_IN_NAMES.sub("_", text).strip("_")
