"""Numbers and verdicts in words, the same on the screen, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence

from fa_research.compare.cells import Cell
from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import How, Ratio
from fa_research.compare.reading import Record
from fa_research.compare.verdicts import Regret, Verdict
from fa_research.tracking.columns import format_value

_UNITS = (("_tokens_per_s", "tokens/s"), ("_GB_per_s", "GB/s"), ("_TFLOP_per_s", "TFLOP/s"), ("_us", "us"))
# Axes of figures, by the last part of a key.
_AXES = {
    "context_len": "context (tokens)",
    "length": "length (tokens)",
    "new_len": "new tokens per request",
    "prefix_len": "cached prefix (tokens)",
    "prompt_len": "prompt (tokens)",
    "batch_size": "batch size (requests)",
    "page_size": "page size (slots)",
}


def unit(metric: str) -> str:
    """The unit that a metric's name ends with, or nothing."""
    return next((text for ending, text in _UNITS if f"_{metric}".endswith(ending)), "")


def quantity(metric: str) -> str:
    """A metric's name as words with its unit: decode step (us)."""
    ending = next((ending for ending, _ in _UNITS if f"_{metric}".endswith(ending)), "")
    name = f"_{metric}".removesuffix(ending).strip("_").replace("_", " ")
    return f"{name} ({unit(metric)})" if unit(metric) else name


def words(metric: str) -> str:
    """A metric's name as words without its unit: decode step."""
    return quantity(metric).partition(" (")[0]


def axis_title(key: str) -> str:
    """A key as the title of an axis, with its unit where it is known."""
    last = key.removesuffix(".name").rpartition(".")[2]
    return _AXES.get(last, last.replace("_", " "))


def number(value: float) -> str:
    return format_value(float(value))


def percent(fraction: float) -> str:
    """A difference in percent, to a tenth up to ten percent: 1.8 %."""
    return f"{fraction * 100:.1f} %" if abs(fraction) < 0.1 else f"{fraction * 100:,.0f} %"


def excess(cost: Ratio) -> str:
    """How much more than the best: 1.8 % [1.5, 2.1], or 12.3x from twice as much on."""
    if cost.value >= 2:
        bounds = "" if cost.low is None or cost.high is None else f" [{cost.low:.3g}, {cost.high:.3g}]"
        return f"{cost.value:.3g}x{bounds}"
    bounds = ""
    if cost.low is not None and cost.high is not None:
        bounds = f" [{(cost.low - 1) * 100:.1f}, {(cost.high - 1) * 100:.1f}]"
    return percent(cost.value - 1) + bounds


def comparative(comparison: Comparison, cost: Ratio) -> str:
    """What a cost above 1 means here: slower, more, less."""
    if comparison.higher:
        return "less"
    return "slower" if comparison.metric.endswith("_us") else "more"


def outcome(comparison: Comparison, cell: Cell, verdict: Verdict) -> str:
    """A cell's verdict in one line."""
    failed = [f"{e.label} {e.status}" for e in cell.entries.values() if e.label not in verdict.costs]
    tail = f" ({', '.join(failed)})" if failed else ""
    if not verdict.best:
        return f"none has a number{tail}"
    if len(verdict.costs) == 1:
        return f"only {verdict.best[0]}{tail}"
    second = verdict.runner_up
    behind = (
        f"{second} {excess(verdict.costs[second])} {comparative(comparison, verdict.costs[second])}"
        if second
        else ""
    )
    if verdict.is_tie:
        others = f"; {behind}" if behind else f" ({excess(verdict.costs[verdict.best[-1]])})"
        return f"tie: {' = '.join(verdict.best)}{others}{tail}"
    return f"{verdict.best[0]}; {behind}{tail}"


def summary(comparison: Comparison) -> list[str]:
    """Who wins how often, in a line for each answer; before that, whether the rows are of one code."""
    lines = [_other_code(comparison)] if comparison.mixed_code else []
    for label in comparison.labels:
        judged = [v for v in comparison.verdicts if label in v.costs and len(v.costs) > 1]
        won = sum(v.best == (label,) for v in judged)
        tied = sum(v.is_tie and label in v.best for v in judged)
        failed = sum(label in c.entries and label not in c.measured for c in comparison.cells)
        alone = sum(list(v.costs) == [label] for v in comparison.verdicts)
        parts = [f"best in {won} of {len(judged)} cells"] * bool(judged)
        parts += [f"the only number in {alone}"] * bool(alone and not judged)
        parts += [f"tied for it in {tied}"] * bool(tied) + [f"no number in {failed}"] * bool(failed)
        lines.append(f"{comparison.question.title}={label}: {', '.join(parts)}")
    return lines


def caveats(comparison: Comparison) -> list[str]:
    """What the intervals rest on, and what they do not cover."""
    how = comparison.how
    lines = [
        f"a difference below {percent(comparison.tie)}, or one whose 95 % interval reaches 0, is a tie; intervals "
        "cover the samples within a run, not the drift from one run to the next"
    ]
    total = sum(how.values())
    if rough := how[How.rough]:
        lines.append(
            f"{rough} of {total} numbers kept too few samples for a bootstrap: their intervals are rough, from the "
            "10th and 90th percentile"
        )
    if none := how[How.none]:
        lines.append(f"{none} of {total} numbers kept no spread: their ratios have no interval")
    return lines


def counted(records: Sequence[Record]) -> str:
    """How many rows there are of each status."""
    count: dict[str, int] = {}
    for record in records:
        count[str(record.row.status)] = count.get(str(record.row.status), 0) + 1
    parts = [f"{n} {status}" for status, n in count.items()]
    return f"{len(records)} rows" + (f" ({', '.join(parts)})" if list(count) != ["ok"] else "")


def regret_summary(comparison: Comparison) -> str:
    """The best single choice in one sentence."""
    found, cells = comparison.regrets
    if not found:
        return "no cell has a row for every answer, so there is no regret to tell"
    best = found[0]
    name = f"{comparison.question.title}={best.label}"
    if len(found) == 1:
        return f"only {name} has numbers, in {best.cells} of {cells} cells, so there is nothing to compare it with"
    missing = len(comparison.cells) - cells
    rest = f" ({missing} more lack a row for some answer)" if missing else ""
    text = (
        f"always {name}: {percent(best.mean.value - 1)} worse than the best of each cell on geometric mean over "
        f"{best.cells} cells{rest}, {excess(Ratio(best.worst))} at worst{_at(best)}"
    )
    if best.failed:
        text = f"no answer has a number in all {cells} cells; {text}, and none in {best.failed}"
    return f"{_other_code(comparison)}; {text}" if comparison.mixed_code else text


def _other_code(comparison: Comparison) -> str:
    """A difference between rows of different code may come from either."""
    title = comparison.question.title
    return (
        f"the rows compared were made by different code, so {title} alone does not explain their differences: "
        f"{comparison.mixed_code}"
    )


def _at(regret: Regret) -> str:
    return f" (at {regret.worst_cell.title})" if regret.worst > 1 and regret.worst_cell.where else ""
