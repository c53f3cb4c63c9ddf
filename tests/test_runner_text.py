"""Rows of `workload=text`: what quality they have, and the text that the model wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fa_research.config import Level
from fa_research.tracking import ROWS_FILE, Status, read_rows
from fa_research.tracking.stream import printable
from tests.measure.broken import FirstTableForAll, install
from tests.test_runner import run, run_py, times_in
from tests.workloads.cells import WORKLOADS, cell


def test_quality_is_a_part_of_text_alone_and_can_be_left_out(tmp_path: Path) -> None:
    columns = {
        "bits_per_byte",
        "decode_bits_per_byte",
        "oracle_bits_per_byte",
        "perplexity",
        "top1_agreement",
    }
    config = cell("text")
    row = run(config, tmp_path / "with")
    assert columns <= set(row.metrics) and row.metrics["top1_agreement"] == 1.0
    assert row.metrics["scored_tokens"] == 34 + 3 + 3 * 8 and row.metrics["decode_scored_tokens"] == 15
    assert list(row.metrics)[0] == "bits_per_byte"
    config.measure.quality = False
    for i, other in enumerate((config, cell("decode"), cell("text", Level.attention))):
        assert not {name for name in run(other, tmp_path / str(i)).metrics if "bits" in name}


def test_a_wrong_cell_says_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inaccurate, so not timed; its quality is there all the same."""
    install(monkeypatch, FirstTableForAll)
    row = run(cell("text"), tmp_path)
    assert row.status is Status.inaccurate and not times_in(row)
    assert row.metrics["bits_per_byte"] != row.metrics["oracle_bits_per_byte"]


def test_generated_text_is_on_the_screen_and_in_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(WORKLOADS["text"], generate=30, prompt="def main(")  # type: ignore[call-arg]
    row = run(cell(options), tmp_path)
    assert row.status is Status.ok
    assert row.generated["prompt"] == "def main(" and len(row.generated["text"]) > 5
    assert printable(row.generated["prompt"] + row.generated["text"]) in capsys.readouterr().out
    assert row.environment["cuda_graph_mode"] == "simulate"


def test_a_prompt_as_it_is_typed(tmp_path: Path) -> None:
    """`workload.prompt="def main("`: the text stands before the table, and nothing is drawn into it."""
    small = ["workload.batch_size=1", "workload.steps=2", "measure=quick", "tracking=disabled"]
    done = run_py("workload.generate=25", "workload.prompt=def main(a, b", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob(f"outputs/default/*/{ROWS_FILE}")
    (row,) = read_rows(path)
    assert row.generated["prompt"] == "def main(a, b"
    text = printable("def main(a, b" + row.generated["text"])
    assert text + "\n" in done.stdout and done.stdout.index(text) < done.stdout.index("bits_per_byte")
