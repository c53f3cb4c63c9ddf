"""What a run of the tests covered, in lines at its end. Tests say it with `record_property`, which reaches the process
that prints from every worker:

    "case": the title under which this test counts
    "coverage": [title, number of cases that there are, what they leave out and why]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Record = Callable[[str, object], None]


def lines(reports: Iterable[Any]) -> list[str]:
    """One line for each title, in the order of titles."""
    ran: Counter[str] = Counter()
    covered: dict[str, tuple[int, str]] = {}
    for report in reports:
        if not isinstance(report, pytest.TestReport):
            continue
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "case" and not report.skipped:
                ran[str(value)] += 1
            if key == "coverage":
                title, count, text = value  # type: ignore[misc]
                covered[title] = (count, text)
    return [
        f"{title}: {f'{ran[title]} of {count} cases ran; ' if count else ''}{text}"
        for title, (count, text) in sorted(covered.items())
    ]
