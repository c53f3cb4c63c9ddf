"""Rows that a config calls equal and that are not: of other machines, of trees that no commit names, of other work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare import compare
from fa_research.compare.__main__ import main
from fa_research.compare.closure import close
from fa_research.compare.overview import read_sweep
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE, ROWS_FILE, Row
from tests.compare.results import H200, config_of, noisy, row_of, write_rows, write_sweep

NEWER = {"packages": {"torch": "9.9"}}
TRACES = Path(__file__).resolve().parents[2] / "experiments" / "trace_economics" / "results"


def two(folder: Path, **facts: Any) -> list[Path]:
    """Rows of both page sizes, once as they are and once with other facts of the environment."""
    return [
        write_rows(
            folder / f"{number}" / ROWS_FILE,
            *(row_of(config_of(page=p), noisy(1.0, seed=p), environment=H200 | more) for p in (1, 16)),
        )
        for number, more in enumerate(({}, facts))
    ]


def test_a_version_that_is_asked_about_excuses_no_other_machine(tmp_path: Path) -> None:
    files = two(tmp_path, gpu="NVIDIA B200", **NEWER)
    with pytest.raises(ConfigError, match=r"2 of 2 cells.*: gpu \(NVIDIA B200 and NVIDIA H200\); --across"):
        compare(files, "environment.packages.torch")


@pytest.mark.parametrize("question", ["environment.packages.torch", "environment.packages", "environment"])
def test_what_is_asked_about_needs_no_across(tmp_path: Path, question: str) -> None:
    found = compare(two(tmp_path, **NEWER), question)
    assert [len(cell.entries) for cell in found.cells] == [2, 2]
    assert not any("different machines" in note for note in found.notes)


def test_what_comes_with_a_gpu_needs_no_across_and_is_named(tmp_path: Path) -> None:
    found = compare(two(tmp_path, gpu="NVIDIA B200", gpu_driver="999"), "environment.gpu")
    assert any("put together: gpu_driver (580 and 999)" in note for note in found.notes)


def test_machines_that_each_have_all_answers_to_a_version_are_cells_of_their_own(tmp_path: Path) -> None:
    files = [*two(tmp_path / "a", **NEWER), *two(tmp_path / "b", gpu="NVIDIA B200", **NEWER)[1:]]
    files += two(tmp_path / "c", gpu="NVIDIA B200")[1:]
    found = compare(files, "environment.packages.torch")
    assert [cell.where["gpu"] for cell in found.cells] == ["NVIDIA B200", "NVIDIA H200"] * 2


def test_across_names_every_fact_that_differs_wherever_it_is_read(tmp_path: Path) -> None:
    files = two(tmp_path / "in", gpu="NVIDIA B200", **NEWER)
    with CONSOLE.capture() as screen:
        arguments = ["-q", "page_size", "--across", "--out", str(tmp_path / "out")]
        assert main([*map(str, files), *arguments]) in (0, 2)  # 2: without the extra report there is no page
    said = "different machines or versions are put together: gpu (NVIDIA B200 and NVIDIA H200), packages.torch (2.11.0"
    assert said in screen.get()
    written = list((tmp_path / "out").glob("report.*"))
    assert written
    assert all(said in path.read_text() for path in written)


def dirty(folder: Path, page: int) -> Path:
    facts = H200 | {"git_commit": "abc", "git_dirty": True}
    return write_rows(folder, row_of(config_of(page=page), noisy(1.0, seed=page), environment=facts))


def test_dirty_trees_of_two_files_are_noted_and_compared(tmp_path: Path) -> None:
    found = compare([dirty(tmp_path / f"{p}" / ROWS_FILE, p) for p in (1, 16)], "page_size")
    (note,) = found.notes
    assert "in 1 of 1 cells rows of different files" in note
    assert f"(git_dirty), so that one commit need not be one code: {tmp_path}/1/{ROWS_FILE}" in note


def test_a_dirty_tree_of_one_sweep_is_one_version(tmp_path: Path) -> None:
    samples = noisy(1.0)
    rows = [
        row_of(config_of(page=p), samples, environment=H200 | {"git_commit": "abc", "git_dirty": True})
        for p in (1, 16)
    ]
    assert compare([write_sweep(tmp_path, *((row, samples) for row in rows))], "page_size").notes == []


def test_a_closure_over_dirty_trees_says_so() -> None:
    studies = Path(__file__).resolve().parents[2] / "experiments"
    files = [studies / name / "results" / ROWS_FILE for name in ("metadata_reuse", "backend_vs_context")]
    assert not any("git_dirty" in note for note in close(files[:1]).notes)
    assert any("git_dirty" in note for note in close(files).notes)


def replayed(page: int, requests: int, tokens: int, time: float = 100.0) -> Row:
    """A row of a trace's end: its step had these requests and cached tokens."""
    samples = noisy(time, seed=page)
    rate = 10.0 / (time / tokens * 1000.0) * 1e6  # 10 requests and 1,000 tokens at the mean
    mean = {"trace_live_requests_mean": 10.0, "trace_live_tokens_mean": 1000.0, "trace_tokens_per_s": rate}
    return row_of(config_of(page=page), samples, trace_step_requests=requests, **mean)


def test_steps_of_other_requests_are_not_judged_against_each_other(tmp_path: Path) -> None:
    rows = [
        replayed(1, 53, 9000),
        replayed(16, 53, 9001, 110.0),
        replayed(64, 52, 9000, 50.0),
        replayed(128, 53, 9900, 50.0),
    ]
    file = write_rows(tmp_path / ROWS_FILE, *rows)
    found = compare([file], "page_size")
    assert [set(cell.entries) for cell in found.cells] == [{"1", "16"}]
    assert found.verdicts[0].best == ("1",)
    assert any("52 to 53 requests with 9,000 to 9,900 cached tokens" in note for note in found.notes)
    assert any("2 rows have no other" in note for note in found.notes)
    (rated,) = compare([file], "page_size", metric="trace_tokens_per_s").cells
    assert len(rated.entries) == 4


def test_where_no_two_steps_are_equal_the_metric_that_helps_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / ROWS_FILE, replayed(1, 53, 9000), replayed(16, 52, 9000))
    with pytest.raises(ConfigError, match="of different work.*--metric trace_tokens_per_s"):
        compare([file], "page_size")


def test_a_sweep_of_unequal_steps_is_drawn_and_says_why_it_is_not_judged(tmp_path: Path) -> None:
    write_rows(tmp_path / ROWS_FILE, replayed(1, 53, 9000), replayed(16, 52, 9000))
    found = read_sweep(tmp_path)
    (part,) = found.parts
    assert part.asked == []
    assert part.lines is not None and len(part.lines.cells) == 2
    assert any(note.startswith("kv.page_size: nothing to compare: steps timed") for note in found.notes)


def test_two_sets_of_equal_steps_are_told_apart(tmp_path: Path) -> None:
    rows = [replayed(p, 53 if p < 64 else 52, 9000, p) for p in (1, 16, 64, 128)]
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "page_size")
    assert [cell.where for cell in found.cells] == [
        {"trace_step_requests": 52, "trace_step_tokens": 9000},
        {"trace_step_requests": 53, "trace_step_tokens": 9000},
    ]


def test_the_tokens_of_published_steps_are_whole() -> None:
    """They are worked out of rates: a number that is not whole would be none of tokens."""
    from fa_research.compare.reading import load
    from fa_research.compare.step_work import step_work

    records, _ = load([TRACES])
    assert len(records) == 30
    for record in records:
        metrics = record.row.metrics
        requests, tokens = step_work(record)
        assert requests == metrics["trace_step_requests"]
        time = (
            metrics["trace_live_tokens_mean"]
            * metrics["decode_step_us"]
            / metrics["trace_live_requests_mean"]
        )
        assert metrics["trace_tokens_per_s"] * time / 1e6 == pytest.approx(tokens, rel=1e-12)


def test_the_published_traces_can_be_asked_as_a_folder() -> None:
    found = compare([TRACES.parent], "kv.page_size", metric="attention_us")
    assert {label for cell in found.cells for label in cell.entries} == {"1", "16"}
    assert any(re.search(r"81 to 88 requests .*trace_tokens_per_s", note) for note in found.notes)
