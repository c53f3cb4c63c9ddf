"""What a whole sweep says, whatever it swept: its choices are found from what differs between the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fa_research.compare.cells import Matching
from fa_research.compare.comparison import TIE, Comparison
from fa_research.compare.estimates import MAIN, choose_metric, higher_is_better
from fa_research.compare.keys import Question, question_of, readable, varying, within
from fa_research.compare.reading import Record, load
from fa_research.compare.step_work import UnequalWork
from fa_research.compare.trust import contention
from fa_research.errors import ConfigError
from fa_research.tracking import Status

USABLE = frozenset({Status.ok, Status.suspect})
_MOST_QUESTIONS = 4  # of one kind of rows; sections of a page nobody reads to the end help nobody
_MOST_ANSWERS = 16
# What a cell is about, rather than a choice somebody could make for it.
_CIRCUMSTANCES = ("workload", "model.name", "model.path", "seed", "device")


@dataclass(eq=False)
class Part:
    """Rows that have one metric in common.

    Attributes:
        lines: every row, also those that no other can be compared with: for figures along an axis.
        asked: a comparison for each swept choice, the first the one to lead with.
    """

    metric: str
    records: list[Record]
    lines: Comparison | None = None
    asked: list[Comparison] = field(default_factory=list)


@dataclass(eq=False)
class Sweep:
    """The rows of a sweep, the keys that it varied, and what can be said of them."""

    folder: Path
    records: list[Record]
    keys: list[str]
    notes: list[str]
    parts: list[Part]

    @property
    def doubtful(self) -> list[Record]:
        """Rows that are not `ok`."""
        return [record for record in self.records if record.row.status is not Status.ok]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(record): number for number, record in enumerate(self.records)}

    def number_of(self, record: Record) -> int:
        return self._numbers[id(record)]


def read_sweep(folder: Path) -> Sweep:
    """The rows below `folder`, put in order. Raises ConfigError if there are none."""
    records, notes = load([folder])
    records.sort(key=_job)
    parts = [
        _part(number, metric, members, records, notes)
        for number, (metric, members) in enumerate(_kinds(records))
    ]
    return Sweep(folder, records, readable(varying(records), records), list(dict.fromkeys(notes)), parts)


def _job(record: Record) -> tuple[list[tuple[int, str]], int]:
    """The order of a sweep's jobs: folders 2 before 10."""
    names = [(int(name) if name.isdigit() else -1, name) for name in record.path.parts]
    return names, record.line


def _kinds(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Rows by the time that is theirs; those without any go with the rows of their workload."""
    metric: dict[int, str] = {}
    for record in records:
        if record.row.status is Status.ok and (name := _metric_of(record)):
            metric[id(record)] = name
    for name in dict.fromkeys(metric.values()):
        members = [record for record in records if metric.get(id(record)) == name]
        workloads = {record.config.get("workload.name") for record in members}
        lost = [r for r in records if id(r) not in metric and r.config.get("workload.name") in workloads]
        yield name, sorted([*members, *lost], key=records.index)


def _metric_of(record: Record) -> str | None:
    for name in MAIN:
        if isinstance(record.row.metrics.get(name), int | float):
            return name
    try:
        return choose_metric(None, [record])[0]
    except ConfigError:
        return None


def _part(number: int, metric: str, members: list[Record], records: list[Record], notes: list[str]) -> Part:
    part = Part(metric, members)
    for place, question in enumerate(_questions(members)):
        if found := _compare(question, metric, members, records, notes):
            found.anchor = f"cell-{number}-{place}"
            part.asked.append(found)
    lead = part.asked[0].question if part.asked else _only_answer(members)
    part.lines = _compare(lead, metric, members, records, [], alone=True)
    return part


def _questions(records: Sequence[Record]) -> Iterator[Question]:
    """The choices that a sweep varied, the backend first."""
    keys = readable(varying(records), records)
    names = dict.fromkeys(
        key.removesuffix(".name") if key.endswith(".name") else key
        for key in sorted(keys, key=lambda key: key != "backend.name")
        if not any(within(key, name) for name in _CIRCUMSTANCES)
    )
    made = 0
    for name in names:
        if any(within(name, group) for group in names if group != name):
            continue  # what belongs to a group that is asked about itself
        question = question_of(name, records)
        if 2 <= len(question.labels) <= _MOST_ANSWERS and made < _MOST_QUESTIONS:
            made += 1
            yield question


def _only_answer(records: Sequence[Record]) -> Question:
    question = question_of("backend.name", records)
    if len(question.labels) == 1:
        return question
    return Question("all rows", ("all",), {id(record): "all" for record in records})


def _compare(
    question: Question,
    metric: str,
    members: list[Record],
    records: list[Record],
    notes: list[str],
    alone: bool = False,
) -> Comparison | None:
    """Rows of several machines are put together only where nothing could be compared otherwise; Matching notes it."""
    for across in (False, True):
        said: list[str] = []
        try:
            cells = Matching(question, metric, (), across, said, alone).cells(members)
        except UnequalWork as error:
            notes.append(f"{question.title}: {error}")
            return None
        except ConfigError:
            continue
        if not any(cell.measured for cell in cells):
            return None
        said += [] if alone else contention(members, metric)
        notes += said
        return Comparison(question, metric, higher_is_better(metric), TIE, records, cells, said)
    return None
