"""What is said where times are not ranked: of a CPU or a busy machine, and where the answers change the result."""

from __future__ import annotations

from fa_research.compare.cells import CHANGES, Cell
from fa_research.compare.comparison import Comparison
from fa_research.compare.keys import order_of, short, text_of
from fa_research.compare.names import number, quantity, words
from fa_research.compare.quality import QUALITY, measure_of, pareto, tradeoffs
from fa_research.text import plural


def banner(comparison: Comparison) -> str:
    """That numbers are shown without a verdict, and why; "" where every cell has one."""
    reasons: dict[str, int] = {}
    for cell in comparison.cells:
        if cell.unjudged and not (reason := cell.unjudged).endswith(CHANGES):
            reasons[reason] = reasons.get(reason, 0) + 1
    lines = []
    for reason, count in reasons.items():
        where = "" if count == len(comparison.cells) else f" in {count} of {len(comparison.cells)} cells"
        lines.append(f"what is shown{where} are times, no verdict: {reason}")
    if comparison.weighs_quality:
        lines.append(
            f"{comparison.question.title} changes the result, so no value of it is best by time: weigh "
            "quality against it"
        )
    return "; ".join(lines)


def verdict_title(comparison: Comparison) -> str:
    """The head of the column of `outcome`."""
    if comparison.weighs_quality:
        return "quality"
    return "best, and how the next compares" if comparison.ranked else "verdict"


def axes_words(comparison: Comparison) -> str:
    """Every key that varies between cells, with its values: batch_size 1, 16; context_len 1,024 to 131,072 (8)."""
    said = []
    keys = list(comparison.cells[0].where) if comparison.cells else []
    for key in keys:
        values = sorted(
            {text_of(v): v for c in comparison.cells for v in [c.where[key]]}.values(), key=order_of
        )
        texts = [text_of(value) for value in values]
        many = f"{texts[0]} to {texts[-1]} ({len(texts)})"
        said.append(f"{short(key, keys)} {', '.join(texts) if len(texts) <= 4 else many}")
    return "; ".join(said)


def is_by_quality(cell: Cell) -> bool:
    """Whether nothing but that the answers change the result keeps the cell from a verdict: its times count."""
    return cell.unjudged.endswith(CHANGES)


def quality_words(cell: Cell, higher: bool) -> str:
    """What each answer's quality is, and which are on the Pareto front."""
    points = tradeoffs(cell)
    name = measure_of(points)
    if name is None:
        return "no quality was measured"
    said = ", ".join(f"{p.label} {number(p.quality[name])}" for p in points)
    if len(points) < 2 or not is_by_quality(cell):
        return f"{words(name)}: {said}"
    front = ", ".join(point.label for point in pareto(points, name, higher=higher))
    return f"{words(name)}: {said}; on the Pareto front: {front}"


def numbers_of(comparison: Comparison, label: str) -> str:
    """Without a verdict: in how many cells an answer has a number, and the range of its quality."""
    numbers = [cell.measured[label].value for cell in comparison.cells if label in cell.measured]
    said = f"a number in {len(numbers)} of {plural(len(comparison.cells), 'cell')}"
    points = [p for cell in comparison.cells for p in tradeoffs(cell) if p.label == label]
    for name in QUALITY if comparison.weighs_quality else ():
        if values := sorted(p.quality[name] for p in points if name in p.quality):
            ends = dict.fromkeys(map(number, (values[0], values[-1])))
            said += f", {words(name)} {' to '.join(ends)}"
    if numbers and comparison.weighs_quality:
        ends = dict.fromkeys(map(number, (min(numbers), max(numbers))))
        said += f", {quantity(comparison.metric)} {' to '.join(ends)}"
    return f"{comparison.question.title}={label}: {said}"
