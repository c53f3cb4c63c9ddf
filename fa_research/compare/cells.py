"""Cells: rows that are equal in everything but the question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from fa_research.compare.estimates import Estimate, estimate, in_turns, pooled
from fa_research.compare.keys import (
    ABSENT,
    NOT_MATCHED,
    Question,
    changes_result,
    order_of,
    readable,
    text_of,
    title_of,
    varying,
    within,
)
from fa_research.compare.machines import asked_facts, differing_facts, mixed_notes, refuse_mixed
from fa_research.compare.reading import TIMED, Record
from fa_research.compare.step_work import REQUESTS, TOKENS, UnequalWork, by_work, step_work, unequal_words
from fa_research.compare.trust import cell_reason, is_time, timed_together
from fa_research.errors import ConfigError
from fa_research.text import plural
from fa_research.tracking import Status

_MOST_PAIRS = 200_000  # looked at to explain an empty comparison
_RAN = ("cuda_graph_mode", "dtype", "triton_interpreter")  # facts of the environment that decide a time
_TAKEN = ("timing_method", "timing_l2")
_MOST_KEYS = 6
CHANGES = "changes the result"


@dataclass(eq=False)
class Entry:
    """One answer's row in a cell, and its number: None where the row is not `ok` or has none."""

    label: str
    record: Record
    estimate: Estimate | None
    runs: list[Record] = field(default_factory=list)  # those the number is of, the latest first

    @property
    def status(self) -> str:
        return "no number" if self.row_ok and self.estimate is None else str(self.record.row.status)

    @property
    def row_ok(self) -> bool:
        return self.record.row.status is Status.ok


@dataclass(eq=False)
class Cell:
    """What the rows of a cell have in common (the keys that vary between cells), and an entry for each answer."""

    where: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    unjudged: str = ""  # why none of its answers may win
    in_turns: dict[str, Estimate] = field(
        default_factory=dict
    )  # ratios of `measure.against`, if all have them

    @property
    def measured(self) -> dict[str, Estimate]:
        """The numbers that count; rows that are not `ok` never do."""
        return {label: entry.estimate for label, entry in self.entries.items() if entry.estimate is not None}

    @property
    def title(self) -> str:
        return title_of(self.where)


def _is_rerun(later: Record, earlier: Record) -> bool:
    """Whether two rows of one cell are of one config and one kind of GPU: two runs, whatever else differs."""
    same = later.hash == earlier.hash and later.machine.get("gpu") == earlier.machine.get("gpu")
    return same and all(record.row.status is Status.ok for record in (later, earlier))


@dataclass
class Matching:
    """How rows are put together: keys that need not be equal, whether machines and versions need be, and whether a row
    that has no other beside it makes a cell too (`alone`: for figures, where timed steps may be of different work)."""

    question: Question
    metric: str
    ignore: tuple[str, ...] = ()
    across: bool = False
    notes: list[str] = field(default_factory=list)
    alone: bool = False
    _free: dict[str, bool] = field(default_factory=dict)  # keys that need not be equal

    def cells(self, records: Sequence[Record]) -> list[Cell]:
        """Cells with two answers at least (one, with `alone`), in the order of their values.

        Raises ConfigError if there is none, saying why, and where rows of one cell differ in machine or version,
        which is not what is asked, and `across` is not set.
        """
        asked = [record for record in records if self.question.label(record) is not None]
        if left := len(records) - len(asked):
            self.notes.append(f"{plural(left, 'row has', 'rows have')} no {self.question.name}: left out")
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in asked:
            groups.setdefault(self._signature(record), []).append(record)
        refuse_mixed(self.question, list(groups.values()), self._facts)
        alike = [members for group in groups.values() for members in self._by_machine(group)]
        parted = [[part] if self.alone else by_work(part, self.metric) for part in alike]
        fewest = 1 if self.alone else 2
        kept = [[part for part in parts if len(self._labels(part)) >= fewest] for parts in parted]
        matched = [part for parts in kept for part in parts]
        self._note_unequal_work(parted, nothing_left=not matched)
        if not matched:
            raise ConfigError(self._why_empty(asked))
        if alone := len(asked) - len({id(record) for part in matched for record in part}):
            self.notes.append(
                f"{plural(alone, 'row has', 'rows have')} no other to be compared with: left out"
            )
        self._note_what_ran(matched)
        self.notes += mixed_notes(self.question, matched)
        return self._build(matched, by_work=any(len(parts) > 1 for parts in kept))

    def _labels(self, records: Sequence[Record]) -> set[str | None]:
        return {self.question.label(record) for record in records}

    def _is_free(self, key: str) -> bool:
        if key not in self._free:
            names = (self.question.name, *NOT_MATCHED, *self.ignore)
            self._free[key] = any(within(key, name) for name in names)
        return self._free[key]

    def _signature(self, record: Record) -> tuple[Any, ...]:
        return tuple(sorted((k, repr(v)) for k, v in record.config.items() if not self._is_free(k)))

    def _facts(self, record: Record) -> dict[str, str]:
        """What has to be equal of machine and versions."""
        is_asked = asked_facts(self.question)
        return {} if self.across else {k: v for k, v in record.machine.items() if not is_asked(k)}

    def _by_machine(self, group: Sequence[Record]) -> Iterator[list[Record]]:
        """The rows of each machine and version. A row without a time says nothing of its machine and goes to all."""
        timed: dict[tuple[Any, ...], list[Record]] = {}
        for record in group:
            if record.row.status in TIMED:
                timed.setdefault(tuple(self._facts(record).items()), []).append(record)
        others = [record for record in group if record.row.status not in TIMED]
        yield from ([*members, *others] for members in timed.values() or [[]])

    def _note_unequal_work(self, parted: Sequence[list[list[Record]]], nothing_left: bool) -> None:
        """Raises UnequalWork if it is why nothing is left to compare."""
        unequal = [parts for parts in parted if len(parts) > 1 and len(self._labels(sum(parts, []))) > 1]
        if not unequal:
            return
        said = unequal_words([[record for part in parts for record in part] for parts in unequal])
        if nothing_left:
            raise UnequalWork(f"nothing to compare: steps timed with equal configs are {said}")
        self.notes.append(
            f"in {len(unequal)} of {len(parted)} cells the timed steps are {said}. Rows of equal steps are compared"
        )

    def _build(self, matched: Sequence[Sequence[Record]], by_work: bool) -> list[Cell]:
        everyone = [record for members in matched for record in members]
        keys = [key for key in varying(everyone) if not self._is_free(key)]
        keys = readable(keys, everyone)
        machine = differing_facts(everyone, self._facts)
        cells, repeated, several = [], 0, 0
        together = {id(record) for record in timed_together(everyone)}
        for members in matched:
            cell = Cell({key: members[0].config.get(key, ABSENT) for key in keys})
            cell.where |= {key: members[0].machine.get(key, ABSENT) for key in machine}
            if by_work:
                cell.where |= dict(zip((REQUESTS, TOKENS), step_work(members[0]), strict=True))
            for record in sorted(members, key=lambda record: record.row.finished):
                label = self.question.label(record)
                assert label is not None
                before = cell.entries.get(label)
                runs = [record, *(before.runs if before and _is_rerun(record, before.record) else [])]
                repeated += before is not None and len(runs) == 1
                several += len(runs) > 1
                cell.entries[label] = Entry(label, record, self._number(runs), runs)
            self._judgeable(cell, together)
            cells.append(cell)
        if repeated:
            have = plural(repeated, "row has", "rows have")
            self.notes.append(f"{have} a later one in the same cell: the latest of each counts")
        if several:
            self.notes.append(
                f"{plural(several, 'row is an earlier run', 'rows are earlier runs')} of a config on another machine "
                "or version: the geometric mean of all its runs counts"
            )
        return sorted(cells, key=lambda cell: [order_of(value) for value in cell.where.values()])

    def _judgeable(self, cell: Cell, together: set[int]) -> None:
        """Whether the cell's numbers may be ranked, and whether by `measure.against`."""
        counted = [entry.record for entry in cell.entries.values() if entry.estimate is not None]
        cell.unjudged = cell_reason(counted, self.metric, together)
        if not cell.unjudged and is_time(self.metric) and changes_result(self.question.name):
            cell.unjudged = f"{self.question.title} {CHANGES}"
        turns = {label: in_turns(cell.entries[label].record, self.metric) for label in cell.measured}
        known = {label: number for label, number in turns.items() if number is not None}
        one = len({str(record.config.get("measure.against")) for record in counted}) == 1
        cell.in_turns = known if one and len(known) == len(turns) else {}

    def _number(self, runs: Sequence[Record]) -> Estimate | None:
        if runs[0].row.status is not Status.ok:
            return None
        if len(runs) == 1:
            return estimate(runs[0], self.metric)
        return pooled([one for record in runs for one in (record, *record.replicates)], self.metric)

    def _note_what_ran(self, matched: Sequence[Sequence[Record]]) -> None:
        """What differs within cells though nobody asked for it: a backend that cannot be captured runs eagerly."""
        for name in (*_RAN, *_TAKEN):
            if name.split("_mode")[0] in self.question.name:
                continue
            found = [
                {
                    str((r.row.metrics if name in _TAKEN else r.row.environment).get(name))
                    for r in members
                    if r.row.status is Status.ok
                }
                for members in matched
            ]
            if differ := [values for values in found if len(values - {"None"}) > 1]:
                values = ", ".join(sorted(set().union(*differ) - {"None"}))
                self.notes.append(f"within {len(differ)} of {len(found)} cells {name} differs too: {values}")

    def _why_empty(self, records: Sequence[Record]) -> str:
        """What keeps the closest two rows with different answers apart."""
        best: tuple[int, Record, Record, list[str]] | None = None
        for number, (a, b) in enumerate(combinations(records, 2)):
            if self.question.label(a) != self.question.label(b):
                keys = [k for k in varying([a, b]) if not self._is_free(k)]
                if best is None or len(keys) < best[0]:
                    best = (len(keys), a, b, keys)
            if number > _MOST_PAIRS:
                break
        assert best is not None, "a question has two answers at least"
        _, a, b, keys = best
        if not keys:  # equal configs on different machines, one of them without a time
            return (
                f"nothing to compare: rows of one cell have {', '.join({str(r.row.status) for r in (a, b)})}"
            )
        differ = "; ".join(
            f"{k} ({text_of(a.config.get(k, ABSENT))} and {text_of(b.config.get(k, ABSENT))})"
            for k in keys[:_MOST_KEYS]
        )
        more = f"; and {len(keys) - _MOST_KEYS} more keys" if len(keys) > _MOST_KEYS else ""
        ignore = " ".join(f"--ignore {k}" for k in (["KEY"] if more else keys))
        return (
            f"nothing to compare: no two rows differ in {self.question.name} alone. The closest, {a.place} and "
            f"{b.place}, differ in {differ}{more} too; {ignore} matches rows whatever they have, so "
            "that different work may be compared"
        )
