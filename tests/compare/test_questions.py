"""From names to answers, from rows to cells, and what is said where that is not possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fa_research.compare import Comparison, compare
from fa_research.errors import ConfigError
from fa_research.tracking import ROWS_FILE, Row, Status
from tests.compare.results import H200, config_of, noisy, row_of, sweep, write_rows

TWO = {("fa3", 1024): 100.0, ("triton", 1024): 110.0, ("fa3", 4096): 200.0, ("triton", 4096): 190.0}


def compared(folder: Path, *rows: Row, question: str = "backend", **options: Any) -> Comparison:
    return compare([write_rows(folder / ROWS_FILE, *rows)], question, **options)


@pytest.mark.parametrize("question", ["backend", "backend.name"])
def test_rows_that_differ_in_the_question_alone_are_a_cell(tmp_path: Path, question: str) -> None:
    found = compare([sweep(tmp_path, TWO)], question)
    assert [cell.where for cell in found.cells] == [
        {"workload.context_len": 1024},
        {"workload.context_len": 4096},
    ]
    assert [set(cell.entries) for cell in found.cells] == [{"fa3", "triton"}] * 2
    assert found.metric == "decode_step_us"
    assert found.notes == []


def test_a_key_may_be_given_by_its_end(tmp_path: Path) -> None:
    found = compare([sweep(tmp_path, TWO)], "context_len")
    assert found.question.name == "workload.context_len"
    assert found.labels == ["1024", "4096"]


def test_numbers_are_sorted_by_size(tmp_path: Path) -> None:
    rows = [row_of(config_of(page=page), noisy(1.0)) for page in (128, 16, 1)]
    assert compared(tmp_path, *rows, question="page_size").labels == ["1", "16", "128"]


def test_settings_of_one_backend_are_answers_of_their_own(tmp_path: Path) -> None:
    rows = [row_of(config_of("triton", num_splits=n), noisy(1.0)) for n in (0, 8)]
    found = compared(tmp_path, *rows, row_of(config_of("fa3"), noisy(1.0)))
    assert set(found.labels) == {"triton num_splits=0", "triton num_splits=8", "fa3"}


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("kv.page_siz", r"did you mean kv\.page_size"),
        ("backnd", r"did you mean backend"),
        ("num_layers", r"model\.num_layers or workload\.num_layers: say which"),
        (
            "page_size",
            r"all 4 rows have kv\.page_size=1.*varies between them: backend\.name, workload\.context_len",
        ),
        ("study", r"no row has a key study"),
    ],
)
def test_names_that_will_not_do(tmp_path: Path, question: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compare([sweep(tmp_path, TWO)], question)


def test_an_unknown_metric_names_those_there_are_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compare([sweep(tmp_path, TWO)], "backend", metric="foo")
    assert str(caught.value).count("decode_step_tokens_per_s") == 1


def zeros(folder: Path, **metrics: Any) -> Path:
    rows = [row_of(config_of(name), noisy(1.0), **metrics) for name in ("fa3", "triton")]
    return write_rows(folder / ROWS_FILE, *rows)


def test_a_metric_without_a_number_above_0_is_refused_and_not_offered(tmp_path: Path) -> None:
    file = zeros(tmp_path, idle_us=0.0, lost_us=float("nan"))
    assert compare([file], "backend").other_metrics == []
    for name, value in (("idle_us", "0.0"), ("lost_us", "nan")):
        with pytest.raises(
            ConfigError, match=rf"no row has a number above 0 for {name}, which is {value} in 2 rows; "
        ):
            compare([file], "backend", metric=name)


def test_no_part_of_a_step_stands_in_for_it(tmp_path: Path) -> None:
    file = zeros(tmp_path, decode_step_us=0.0, decode_step_ledger_gap_us=1.0)
    with pytest.raises(
        ConfigError, match=r"no row has a whole time above 0.*--metric .*decode_step_ledger_gap_us"
    ):
        compare([file], "backend")
    assert compare([file], "backend", metric="decode_step_ledger_gap_us").labels == ["fa3", "triton"]


def test_cells_without_any_number_are_refused(tmp_path: Path) -> None:
    rows = [row_of(config_of(name), decode_step_us=0.0) for name in ("fa3", "triton")]
    with pytest.raises(
        ConfigError, match=r"none of the 2 rows that match has a number for decode_step_us: 2 no number"
    ):
        compared(tmp_path, *rows, row_of(config_of("fa3", context=7), noisy(1.0)))


def test_a_failure_takes_what_was_noted_with_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / ROWS_FILE, *(row_of(config_of(page=p), noisy(1.0)) for p in (1, 16)))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(
        ConfigError, match=r"^the only row has kv\.page_size=1, so there is nothing to compare"
    ) as caught:
        compare([path], "page_size")
    (note,) = caught.value.__notes__
    assert f"{path}:2 is not a row and was skipped" in note


def test_an_unknown_metric_names_what_is_close(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"did you mean decode_step_us.*there are .*decode_step_tokens_per_s"
    ):
        compare([sweep(tmp_path, TWO)], "backend", metric="decode_us")


def test_an_empty_comparison_names_what_keeps_the_closest_rows_apart(tmp_path: Path) -> None:
    rows = [
        row_of(config_of("fa3", context=1024, batch=1, page=16), noisy(1.0)),
        row_of(config_of("triton", context=2048, batch=8), noisy(1.0)),
        row_of(config_of("torch", context=2048, page=16), noisy(1.0)),
    ]
    said = (
        r"rows\.jsonl:1 and .*rows\.jsonl:3, differ in workload\.context_len \(1024 and 2048\) too; --ignore "
        r"workload\.context_len .*different work may be compared$"
    )
    with pytest.raises(ConfigError, match=said):
        compared(tmp_path, *rows)
    both = r"; --ignore kv\.page_size --ignore workload\.batch_size --ignore workload\.context_len matches"
    with pytest.raises(ConfigError, match=both):
        compared(tmp_path / "two", *rows[:2])
    found = compare([tmp_path], "backend", ignore=["context_len"])
    assert [set(cell.entries) for cell in found.cells] == [{"fa3", "torch"}]
    assert any("1 row has no other" in note for note in found.notes)


def test_without_a_number_the_rows_reasons_are_told(tmp_path: Path) -> None:
    rows = [row_of(config_of(name), status=Status.unsupported) for name in ("fa3", "triton")]
    with pytest.raises(ConfigError, match="none of the 2 rows has a number: 2 unsupported: a reason to be"):
        compared(tmp_path, *rows)


def test_rows_that_are_not_ok_are_in_their_cell_and_never_count(tmp_path: Path) -> None:
    rows = [
        row_of(config_of("fa3"), noisy(100.0)),
        row_of(config_of("triton"), noisy(1.0), status=Status.suspect),
        row_of(config_of("torch"), status=Status.oom, environment={"gpu": None}),
        row_of(config_of("fa2"), noisy(120.0)),
    ]
    (cell,) = compared(tmp_path, *rows).cells
    assert {label: entry.status for label, entry in cell.entries.items()} == {
        "fa3": "ok",
        "triton": "suspect",
        "torch": "oom",
        "fa2": "ok",
    }
    assert set(cell.measured) == {"fa3", "fa2"}


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"gpu": "NVIDIA H100"}, r"gpu \(NVIDIA H100 and NVIDIA H200\)"),
        ({"packages": {"torch": "2.13.0"}}, r"packages\.torch \(2\.11\.0 and 2\.13\.0\)"),
        ({"git_commit": "abc"}, r"git_commit"),
    ],
)
def test_other_machines_and_versions_ask_for_across(tmp_path: Path, facts: dict, named: str) -> None:
    rows = [
        row_of(config_of("fa3"), noisy(1.0)),
        row_of(config_of("triton"), noisy(2.0), environment=H200 | facts),
    ]
    with pytest.raises(ConfigError, match=rf"1 of 1 cells.*{named}.*--across"):
        compared(tmp_path, *rows)
    (cell,) = compare([tmp_path], "backend", across=True).cells
    assert set(cell.entries) == {"fa3", "triton"}


def test_packages_that_time_nothing_may_differ(tmp_path: Path) -> None:
    other = H200 | {"packages": H200["packages"] | {"wandb": "0.99"}}  # type: ignore[operator]
    rows = [row_of(config_of("fa3"), noisy(1.0)), row_of(config_of("triton"), noisy(2.0), environment=other)]
    assert len(compared(tmp_path, *rows).cells) == 1


def test_two_machines_that_each_have_all_answers_are_told_apart(tmp_path: Path) -> None:
    other = H200 | {"gpu": "NVIDIA H100"}
    rows = [
        row_of(config_of(b), noisy(1.0), environment=facts)
        for b in ("fa3", "triton")
        for facts in (H200, other)
    ]
    found = compared(tmp_path, *rows)
    assert [cell.where for cell in found.cells] == [{"gpu": "NVIDIA H100"}, {"gpu": "NVIDIA H200"}]


def test_the_machine_itself_can_be_the_question(tmp_path: Path) -> None:
    other = H200 | {"gpu": "NVIDIA H100", "gpu_driver": "999"}
    rows = [row_of(config_of(), noisy(1.0)), row_of(config_of(), noisy(2.0), environment=other)]
    found = compared(tmp_path, *rows, question="gpu")
    assert found.question.name == "environment.gpu"
    assert found.labels == ["NVIDIA H100", "NVIDIA H200"]


def test_what_ran_differently_unasked_is_noted(tmp_path: Path) -> None:
    rows = [
        row_of(config_of(name), noisy(1.0), environment=H200 | {"cuda_graph_mode": mode})
        for name, mode in (("fa3", "on"), ("torch", "off"))
    ]
    assert any(
        "1 of 1 cells cuda_graph_mode differs too: off, on" in n for n in compared(tmp_path, *rows).notes
    )


def test_rows_of_an_older_version_match_those_of_today(tmp_path: Path) -> None:
    old = config_of("fa3")
    del old["sampling"]
    found = compared(tmp_path, row_of(old, noisy(1.0)), row_of(config_of("triton"), noisy(1.0)))
    assert [set(cell.entries) for cell in found.cells] == [{"fa3", "triton"}]
