"""What tests of timers on a GPU share: the kinds of timer, and a cache folder of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa_research.config import TimerKind
from fa_research.measure.roofline import measure_roof

KINDS = list(TimerKind)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measure_roof.cache_clear()
