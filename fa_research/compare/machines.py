"""Machines and versions: what rows of one cell must have in common besides their configs, and what is said where they
need not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fa_research.compare.keys import ABSENT, ENVIRONMENT, Question, within
from fa_research.compare.reading import COMMIT, PACKAGE, TIMED, Record
from fa_research.errors import ConfigError

# What cannot stay as it is where a fact that is asked about differs.
_IMPLIED = {
    "gpu": ("gpu_driver", "cpu", "cpu_threads"),
    "cpu": ("cpu_threads",),
    "packages.torch": ("cuda", "packages.triton"),
    COMMIT: (PACKAGE,),
    PACKAGE: (COMMIT,),  # of rows that have no fingerprint
}
_PARTS = f"{ENVIRONMENT}code.parts"
Facts = Callable[[Record], dict[str, str]]


def asked_facts(question: Question) -> Callable[[str], bool]:
    """Whether a fact of `Record.machine` is what is asked about, or comes with it."""

    def is_asked(fact: str) -> bool:
        names = [fact, *(name for name, others in _IMPLIED.items() if fact in others)]
        if within(question.name, _PARTS) and fact in (PACKAGE, COMMIT):
            return True  # a part of the package is what is asked about
        return any(within(f"{ENVIRONMENT}{name}", question.name) for name in names)

    return is_asked


def differing_facts(records: Sequence[Record], facts: Facts) -> list[str]:
    """The facts that are not the same in all rows with a time."""
    timed = [facts(record) for record in records if record.row.status in TIMED]
    keys = dict.fromkeys(key for known in timed for key in known)
    return [key for key in keys if len({known.get(key) for known in timed}) > 1]


def refuse_mixed(question: Question, groups: Sequence[Sequence[Record]], facts: Facts) -> None:
    """Raises ConfigError if a cell has its answers only when rows of several machines or versions are put together."""
    mixed: list[list[Record]] = []
    for group in groups:
        timed = [record for record in group if record.row.status in TIMED]
        answers: dict[tuple[Any, ...], set[str | None]] = {}
        for record in timed:
            answers.setdefault(tuple(facts(record).items()), set()).add(question.label(record))
        if answers and max(map(len, answers.values())) < len(set().union(*answers.values())):
            mixed.append(timed)
    if mixed:
        raise ConfigError(
            f"in {len(mixed)} of {len(groups)} cells the rows to compare are of different machines or versions: "
            f"{_told(mixed[:1], facts)}; --across compares them all the same"
        )


def mixed_notes(question: Question, cells: Sequence[Sequence[Record]]) -> list[str]:
    """What differs between the machines and versions of rows that are compared, besides what was asked; and where one
    commit may stand for several trees."""
    notes = []

    def facts(record: Record) -> dict[str, str]:
        return {k: v for k, v in record.machine.items() if not within(f"{ENVIRONMENT}{k}", question.name)}

    if mixed := [records for records in cells if differing_facts(records, facts)]:
        notes.append(
            f"in {len(mixed)} of {len(cells)} cells rows of different machines or versions are put together: "
            f"{_told(mixed, facts)}"
        )
    if dirty := [records for records in cells if dirty_files(records)]:
        notes.append(f"in {len(dirty)} of {len(cells)} cells {dirty_words(dirty)}")
    return notes


def _told(groups: Sequence[Sequence[Record]], facts: Facts) -> str:
    """gpu (NVIDIA H100 and NVIDIA H200), of all groups together; of the package also which parts of it differ."""
    values: dict[str, set[str]] = {}
    for records in groups:
        for key in differing_facts(records, facts):
            timed = [record for record in records if record.row.status in TIMED]
            values.setdefault(key, set()).update(facts(record).get(key, ABSENT) for record in timed)
    parts = f", which differ in {' and '.join(found)}" if (found := _differing_parts(groups)) else ""
    return ", ".join(
        f"{key} ({' and '.join(sorted(found))}{parts if key == PACKAGE else ''})"
        for key, found in values.items()
    )


def _differing_parts(groups: Sequence[Sequence[Record]]) -> list[str]:
    """The parts of the package that are not the same in all rows with a fingerprint."""
    known = [r.code["parts"] for group in groups for r in group if isinstance(r.code.get("parts"), dict)]
    names = sorted({name for parts in known for name in parts})
    return [name for name in names if len({parts.get(name) for parts in known}) > 1]


def mixed_code(question: Question, cells: Sequence[Sequence[Record]]) -> str:
    """What differs between the code of rows that are compared, where that is not what is asked; "" if nothing does."""
    is_asked = asked_facts(question)

    def facts(record: Record) -> dict[str, str]:
        return {
            k: v for k, v in record.machine.items() if k.startswith(("code.", COMMIT)) and not is_asked(k)
        }

    return _told([records for records in cells if differing_facts(records, facts)], facts)


def dirty_files(records: Sequence[Record]) -> set[str]:
    """Where the rows are from that were measured with uncommitted changes and have no fingerprint to tell their code.
    None where all rows are of one sweep or file, which is of one tree."""
    timed = [record for record in records if record.row.status in TIMED]
    if len({record.source for record in timed}) < 2:
        return set()
    doubtful = (record for record in timed if record.row.environment.get("git_dirty") and not record.code)
    return {str(record.source) for record in doubtful}


def dirty_words(groups: Sequence[Sequence[Record]]) -> str:
    """The note on rows of several files, of which some are of a dirty tree."""
    files = sorted(set().union(*map(dirty_files, groups)))
    more = f" and {len(files) - 4} more" if len(files) > 4 else ""
    return (
        "rows of different files are compared, and some were measured with uncommitted changes (git_dirty), so that "
        f"one commit need not be one code: {', '.join(files[:4])}{more}"
    )
