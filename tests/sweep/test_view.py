"""A sweep on the screen: what is said of each cell, and how long the rest is expected to take."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fa_research.sweep.cells import Cell
from fa_research.sweep.view import SweepView
from fa_research.tracking import Row, Status


def test_the_first_estimate_leaves_out_the_imports() -> None:
    view = SweepView(11, enabled=False)
    view.started -= 60  # for so long torch was imported
    cell = Cell(0, [], {})
    view.end(cell, Row(Status.ok, started=(datetime.now(UTC) - timedelta(seconds=2)).isoformat()))
    assert view._estimate() == "1 of 11, 1 min 0 s gone, about 20 s left"


def test_a_cell_is_told_by_what_it_does_not_share() -> None:
    shared = frozenset(["model=tiny", "measure=quick"])
    typed = ["model=tiny", "measure=quick", "kv.page_size=16", "hydra.sweep.dir=x"]
    assert Cell(0, typed, {}, shared=shared).text == "kv.page_size=16"
    assert Cell(0, typed[:2], {}, shared=shared).text == "model=tiny measure=quick"
