"""The whole of a comparison: rows in, verdicts out. The command line and a notebook use the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fa_research.compare.cells import Cell, Matching
from fa_research.compare.estimates import How, choose_metric, higher_is_better
from fa_research.compare.keys import Question, ask, changes_result, resolve
from fa_research.compare.machines import mixed_code
from fa_research.compare.reading import Record, load, told_on_failure
from fa_research.compare.trust import contention, is_time
from fa_research.compare.verdicts import Regret, Verdict, judge, regrets
from fa_research.errors import ConfigError

TIE = 0.01  # a median's difference below this is a tie, whatever its interval: two runs of one cell differ by as much


@dataclass(eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        records: all rows read, each config once; a row's number in reports is its place here.
        cells: in the order of their keys.
        notes: what a reader has to know: repeated rows, other versions, rows left out.
        anchor: what the anchors of its cells begin with on a page.
    """

    question: Question
    metric: str
    higher: bool
    tie: float
    records: list[Record]
    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    other_metrics: list[str] = field(default_factory=list)
    anchor: str = "cell"

    @cached_property
    def labels(self) -> list[str]:
        """The answers that are in a cell."""
        return [label for label in self.question.labels if any(label in cell.entries for cell in self.cells)]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each cell."""
        return [judge(cell, higher=self.higher, tie=self.tie) for cell in self.cells]

    @property
    def ranked(self) -> bool:
        """Whether any cell has a verdict: one answer beats another there, or ties."""
        return any(verdict.best for verdict in self.verdicts)

    @property
    def weighs_quality(self) -> bool:
        """Whether the answers change what is computed, so that a time alone chooses none of them."""
        return is_time(self.metric) and changes_result(self.question.name)

    @property
    def drift(self) -> float:
        """The fraction below which two numbers of different runs are never ranked; 0 where all took turns."""
        return max((max(v.drift.values(), default=0.0) for v in self.verdicts), default=0.0)

    @cached_property
    def regrets(self) -> tuple[list[Regret], int]:
        return regrets(self.cells, self.labels, higher=self.higher)

    @cached_property
    def mixed_code(self) -> str:
        """What differs between the code of the rows that are judged against each other; "" where all have one code, or
        the code is the question."""
        judged = ([entry.record for entry in cell.entries.values() if entry.estimate] for cell in self.cells)
        return mixed_code(self.question, list(judged))

    @property
    def how(self) -> dict[How, int]:
        """What intervals rest on: how many numbers of each kind."""
        count = dict.fromkeys(How, 0)
        for cell in self.cells:
            for number in cell.measured.values():
                count[number.how] += 1
        return count

    def number_of(self, record: Record) -> int:
        return self._numbers[id(record)]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(record): number for number, record in enumerate(self.records)}


def compare(
    paths: Sequence[Path],
    question: str,
    *,
    metric: str | None = None,
    ignore: Sequence[str] = (),
    across: bool = False,
    tie: float = TIE,
    higher: bool | None = None,
) -> Comparison:
    """Match the rows of `paths` that differ in `question` alone, and judge every cell.

    Args:
        paths: folders (every rows*.jsonl below them) and files.
        question: a dotted config key, a group (`backend`), a fact of the environment, or the end of such a name.
        metric: None takes the time that most rows have.
        ignore: keys or groups that need not be equal.
        across: put rows of different machines and versions together.
        tie: fraction below which a difference counts for nothing.
        higher: whether more is better; None goes by the metric's name.

    Raises:
        ConfigError: nothing to read, unknown names, rows that need `across`, nothing that matches, no numbers. Its
            `__notes__` are the notes made by then.
    """
    records, notes = load(paths)
    with told_on_failure(notes):
        asked = ask(question, records)
        chosen, others = choose_metric(metric, records)
        matching = Matching(asked, chosen, tuple(resolve(key, records) for key in ignore), across, notes)
        cells = matching.cells(records)
        if not any(cell.measured for cell in cells):
            raise ConfigError(_no_number(chosen, cells))
    better_high = higher_is_better(chosen) if higher is None else higher
    notes += contention(records, chosen)
    return Comparison(asked, chosen, better_high, tie, records, cells, notes, others)


def _no_number(metric: str, cells: Sequence[Cell]) -> str:
    entries = [entry for cell in cells for entry in cell.entries.values()]
    statuses = dict.fromkeys(entry.status for entry in entries)
    counted = ", ".join(f"{sum(e.status == status for e in entries)} {status}" for status in statuses)
    return f"none of the {len(entries)} rows that match has a number for {metric}: {counted}"
