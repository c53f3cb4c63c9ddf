"""Rates have the certainty of the time that they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa_research.compare.estimates import How, estimate
from fa_research.compare.reading import Record, load
from fa_research.tracking import Row, Status

SAMPLES = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]


@pytest.mark.parametrize("kind", ["", "computed_", "prompt_"])
def test_every_rate_of_a_prefill_has_the_interval_of_its_time(kind: str) -> None:
    name = f"prefill_{kind}tokens_per_s"
    row = Row(Status.ok, metrics={"prefill_us": 103.0, name: 1e6}, samples={"prefill_us": SAMPLES})
    found = estimate(Record(row, Path("rows.jsonl"), 1), name)
    assert found is not None and found.how is How.bootstrap and found.interval is not None


@pytest.mark.parametrize(
    ("workload", "today"),
    [("text", "prefill_prompt_tokens_per_s"), ("extend", "prefill_computed_tokens_per_s")],
)
def test_the_rate_of_older_rows_is_read_under_the_name_of_today(
    tmp_path: Path, workload: str, today: str
) -> None:
    config = {"backend": {"name": "torch"}, "kv": {"page_size": 16}, "workload": {"name": workload}}
    row = Row(Status.ok, config=config, metrics={"prefill_tokens_per_s": 7.0})
    (tmp_path / "rows.jsonl").write_text(row.to_json() + "\n")
    (record,), notes = load([tmp_path])
    assert record.row.metrics == {today: 7.0}
    assert f"prefill_tokens_per_s of older rows is read as {today}" in notes
