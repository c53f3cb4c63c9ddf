"""Numbers and verdicts in words, the same on the screen, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence

from fa_research.compare.cells import Cell
from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import How, Ratio, kind_of
from fa_research.compare.names import percent
from fa_research.compare.no_verdict import axes_words, banner, numbers_of, quality_words
from fa_research.compare.reading import Record
from fa_research.compare.trust import is_time
from fa_research.compare.verdicts import Regret, Verdict
from fa_research.text import plural


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
    if comparison.weighs_quality:
        return quality_words(cell, comparison.higher) + ", ".join(
            f" ({e.label} {e.status})" for e in cell.entries.values() if e.estimate is None
        )
    if verdict.unjudged:
        missing = [f"{e.label} {e.status}" for e in cell.entries.values() if e.estimate is None]
        return f"not judged: {verdict.unjudged}" + (f" ({', '.join(missing)})" if missing else "")
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
        last = verdict.costs[verdict.best[-1]]
        near = comparison.tie < last.value - 1 <= verdict.drift.get(verdict.best[-1], 0.0)
        why = "closer than the drift between runs" if near else ""
        if behind:
            return f"tie: {' = '.join(verdict.best)}{f' ({why})' if why else ''}; {behind}{tail}"
        how = ", ".join(filter(None, [excess(last), why]))
        return f"tie: {' = '.join(verdict.best)} ({how}){tail}"
    return f"{verdict.best[0]}; {behind}{tail}"


def summary(comparison: Comparison) -> list[str]:
    """Who wins how often, in a line for each answer; before that, whether the rows are of one code."""
    lines = [_other_code(comparison)] if comparison.mixed_code else []
    for label in comparison.labels:
        if comparison.weighs_quality or not comparison.ranked:
            lines.append(numbers_of(comparison, label))
            continue
        judged = [v for v in comparison.verdicts if label in v.costs and len(v.costs) > 1]
        won = sum(v.best == (label,) for v in judged)
        tied = sum(v.is_tie and label in v.best for v in judged)
        failed = sum(label in c.entries and label not in c.measured for c in comparison.cells)
        alone = sum(list(v.costs) == [label] for v in comparison.verdicts)
        parts = [f"best in {won} of {plural(len(judged), 'cell')}"] * bool(judged)
        parts += [f"the only number in {alone}"] * bool(alone and not judged)
        parts += [f"tied for it in {tied}"] * bool(tied) + [f"no number in {failed}"] * bool(failed)
        lines.append(f"{comparison.question.title}={label}: {', '.join(parts)}")
    return lines


def _drift_line(comparison: Comparison) -> list[str]:
    """The drift between runs that is part of every interval, and where its size is from."""
    if not is_time(comparison.metric) or not comparison.ranked:
        return []
    record = next(
        entry.record for cell in comparison.cells for entry in cell.entries.values() if entry.estimate
    )
    source = record.drift.source(kind_of(record), comparison.metric)
    if not comparison.drift:
        return [
            "the rows compared took turns in one process (measure.against): no drift between runs is in the way"
        ]
    return [
        f"two numbers closer than the drift between runs ({percent(comparison.drift)}) are not ranked: use "
        "measure.against, which times both in turns. The drift is part of every interval; "
        f"its source: {source}"
    ]


def caveats(comparison: Comparison) -> list[str]:
    """What the intervals rest on, and what they do not cover."""
    how = comparison.how
    lines = [
        *_drift_line(comparison),
    ]
    if comparison.ranked:
        lines.insert(
            0, f"a difference below {percent(comparison.tie)}, or one whose 95 % interval reaches 0, is a tie"
        )
    total = sum(how.values())
    if rough := how[How.rough]:
        lines.append(
            f"{rough} of {total} numbers kept too few samples for a bootstrap: their intervals are rough, from the "
            "10th and 90th percentile"
        )
    if none := how[How.none]:
        lines.append(
            f"{none} of {total} numbers kept no spread"
            + (": their intervals hold the drift between runs alone" if is_time(comparison.metric) else "")
        )
    return lines


def counted(records: Sequence[Record]) -> str:
    """How many rows there are of each status."""
    count: dict[str, int] = {}
    for record in records:
        count[str(record.row.status)] = count.get(str(record.row.status), 0) + 1
    parts = [f"{n} {status}" for status, n in count.items()]
    return plural(len(records), "row") + (f" ({', '.join(parts)})" if list(count) != ["ok"] else "")


def regret_summary(comparison: Comparison) -> str:
    """The best single choice in one sentence; of one cell its verdict, and where nothing is ranked why."""
    if comparison.weighs_quality or not comparison.ranked:
        where = axes_words(comparison)
        said = banner(comparison) or "no cell has a number"
        return f"{comparison.question.title}{f' (along {where})' if where else ''}: {said}"
    if len(comparison.cells) == 1:
        (cell,), (verdict,) = comparison.cells, comparison.verdicts
        text = f"{comparison.question.title}: {outcome(comparison, cell, verdict)}"
        return f"{_other_code(comparison)}; {text}" if comparison.mixed_code else text
    found, cells = comparison.regrets
    if not found:
        return "no cell has a row for every answer, so there is no regret to tell"
    best = found[0]
    name = f"{comparison.question.title}={best.label}"
    if len(found) == 1:
        where = f"in {best.cells} of {plural(cells, 'cell')}"
        return f"only {name} has numbers, {where}, so there is nothing to compare it with"
    if all(verdict.is_tie and len(verdict.best) == len(verdict.costs) for verdict in comparison.verdicts):
        where = axes_words(comparison)
        tied = f"{plural(len(comparison.cells), 'cell')}{f' ({where})' if where else ''}"
        text = f"{comparison.question.title}: no answer is surely better than another in any of {tied}"
        return f"{_other_code(comparison)}; {text}" if comparison.mixed_code else text
    missing = len(comparison.cells) - cells
    rest = f" ({missing} more lack a row for some answer or are not judged)" if missing else ""
    along = f" ({where})" if (where := axes_words(comparison)) else ""
    text = (
        f"always {name}: {percent(best.mean.value - 1)} worse than the best of each cell on geometric mean over "
        f"{plural(best.cells, 'cell')}{along}{rest}, {excess(Ratio(best.worst))} at worst{_at(best)}"
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
