"""Rows of code that has changed since: a sweep that goes on makes them again, or keeps them and says so."""

from __future__ import annotations

import logging

from fa_research import fingerprint
from fa_research.tracking import Row, Status
from fa_research.tracking.environment import NOT_TIMED, packages

log = logging.getLogger(__name__)

BEFORE = "unknown: made before rows had fingerprints"
_TIMED = frozenset({Status.ok, Status.suspect, Status.inaccurate})
_MOST_NAMED = 4


def what_changed(row: Row) -> list[str]:
    """What of the code and of the packages has changed since a row was made: names, [] if nothing has.

    A package that has been installed since does not concern a row that was timed without it. One that was not timed,
    such as that of a backend whose package was missing, may end otherwise now.
    """
    code = row.environment.get("code")
    if not isinstance(code, dict):
        return [BEFORE]
    return [*fingerprint.changes(code), *_changed_packages(row)]


def _changed_packages(row: Row) -> list[str]:
    before, now = row.environment.get("packages") or {}, packages()
    names = before if row.status in _TIMED else before | now
    return [
        f"{name} ({before.get(name, 'absent')} before, {now.get(name, 'absent')} now)"
        for name in names
        if name not in NOT_TIMED and before.get(name) != now.get(name)
    ]


class StaleRows:
    """The rows of one sweep whose code has changed. `keep`: they stay as they are (`sweep.keep_stale`)."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.jobs: list[int] = []
        self.changed: dict[str, None] = {}

    def is_to_be_replaced(self, job: int, row: Row) -> bool:
        """Whether cell `job` has to be run again though it has this row."""
        changed = what_changed(row)
        if changed:
            self.jobs.append(job)
            self.changed |= dict.fromkeys(changed)
        return bool(changed) and not self.keep

    def say(self) -> None:
        """Say on one line how many rows are stale, why, and what becomes of them."""
        if not self.jobs:
            return
        names = list(self.changed)
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        changed = f"{', '.join(names[:_MOST_NAMED])}{more}"
        one = len(self.jobs) == 1
        rows = f"{len(self.jobs)} {'row was' if one else 'rows were'} made by other code than there is now ({changed})"
        if self.keep:
            log.warning("%s and kept: sweep.keep_stale=true", rows)
        else:
            log.warning(
                "%s: %s again; sweep.keep_stale=true keeps such rows",
                rows,
                "its cell is run" if one else "their cells are run",
            )
