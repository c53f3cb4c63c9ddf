"""Folders as they are found: gathered twice, torn, repeated, of another version or machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fa_research.compare import compare
from fa_research.compare.estimates import How
from fa_research.compare.files import write_markdown
from fa_research.compare.reading import load
from fa_research.errors import ConfigError
from fa_research.tracking import ROWS_FILE, Row, Status
from tests.compare.results import (
    H200,
    METRIC,
    config_of,
    noisy,
    row_of,
    write_rows,
    write_series,
    write_sweep,
)


def test_a_sweep_is_read_once_with_the_samples_of_its_cells(tmp_path: Path) -> None:
    samples = noisy(100.0)
    write_sweep(
        tmp_path, (row_of(config_of("fa3"), samples), samples), (row_of(config_of("triton"), samples), ())
    )
    records, notes = load([tmp_path])
    assert [record.row.config["backend"]["name"] for record in records] == ["fa3", "triton"]
    assert records[0].samples(METRIC) == pytest.approx(samples)
    assert records[1].samples(METRIC) == ()
    assert notes == []


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    write_rows(tmp_path / ROWS_FILE, row_of(config_of(), noisy(1.0)))
    records, notes = load([tmp_path, tmp_path / ROWS_FILE])
    assert len(records) == 1
    assert notes == []


def test_a_torn_last_line_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / ROWS_FILE, row_of(config_of("fa3"), noisy(1.0)), row_of(config_of("triton")))
    path.write_text(path.read_text()[:-40])
    records, notes = load([tmp_path])
    assert [record.config["backend.name"] for record in records] == ["fa3"]
    assert any(f"{path}:2 is not a row" in note for note in notes)


def test_the_latest_row_of_a_config_counts_whatever_the_order(tmp_path: Path) -> None:
    changed = H200 | {"git_dirty": True}  # without a fingerprint the two may be of different code
    new = row_of(config_of(), noisy(2.0), environment=changed, finished="2026-01-02T00:00:00.000+00:00")
    old = row_of(config_of(), noisy(1.0), environment=changed)
    write_rows(tmp_path / "a" / ROWS_FILE, new)
    write_rows(tmp_path / "b" / ROWS_FILE, old)
    (record,), notes = load([tmp_path])
    assert record.row == new
    assert [new.config_hash in note and "latest" in note for note in notes] == [True]


def test_a_failed_attempt_gives_way_to_a_later_one_though_it_knew_no_gpu(tmp_path: Path) -> None:
    failed = row_of(config_of(), status=Status.error, environment={"gpu": None})
    done = row_of(config_of(), noisy(1.0), finished="2026-01-02T00:00:00.000+00:00")
    write_rows(tmp_path / ROWS_FILE, failed, done)
    (record,), _ = load([tmp_path])
    assert record.row == done


def test_equal_configs_of_two_gpus_are_two_rows(tmp_path: Path) -> None:
    other = H200 | {"gpu": "NVIDIA H100"}
    write_rows(
        tmp_path / ROWS_FILE,
        row_of(config_of(), noisy(1.0)),
        row_of(config_of(), noisy(1.0), environment=other),
    )
    records, notes = load([tmp_path])
    assert len(records) == 2
    assert notes == []


def test_keys_that_an_older_version_lacks_get_their_defaults_and_a_note(tmp_path: Path) -> None:
    config = config_of()
    del config["sampling"], config["model"]["moe"]
    write_rows(tmp_path / ROWS_FILE, row_of(config, noisy(1.0)))
    (record,), notes = load([tmp_path])
    (now,), _ = load([write_rows(tmp_path / "now" / ROWS_FILE, row_of(config_of(), noisy(1.0)))])
    assert record.config == now.config
    assert any("another version" in note and "model.moe." in note for note in notes)


def test_rows_of_a_script_keep_their_own_keys(tmp_path: Path) -> None:
    (record,), notes = load(
        [write_rows(tmp_path / ROWS_FILE, Row(Status.ok, {"length": 4}, metrics={"t_us": 1.0}))]
    )
    assert record.config == {"length": 4}
    assert record.hash
    assert notes == []


def test_samples_are_those_of_the_row_not_of_an_earlier_attempt(tmp_path: Path) -> None:
    first, second = noisy(100.0), noisy(200.0)
    write_series(tmp_path, first)
    write_series(tmp_path, second)
    with (tmp_path / "series.jsonl").open("a") as file:
        file.write('{"name": "series/torn')
    write_rows(tmp_path / ROWS_FILE, row_of(config_of(), first))
    (record,), _ = load([tmp_path])
    assert record.samples(METRIC) == pytest.approx(first)


def test_samples_in_the_row_count_if_they_are_of_the_metric() -> None:
    from fa_research.compare.reading import Record

    row = Row(Status.ok, metrics={"attention_us": 2.0, "metadata_us": 9.0, "samples_us": [1.0, 2.0, 3.0]})
    record = Record(row, Path("rows.jsonl"), 1)
    assert record.samples("attention_us") == (1.0, 2.0, 3.0)
    assert record.samples("metadata_us") == ()


def test_samples_that_the_row_holds_come_before_those_beside_it(tmp_path: Path) -> None:
    beside, within = noisy(100.0), noisy(100.0, seed=5)
    write_series(tmp_path, beside)
    row = row_of(config_of(), beside)
    row.samples = {METRIC: [round(sample, 3) for sample in within], "other_us": [1.0]}
    write_rows(tmp_path / ROWS_FILE, row)
    (record,), _ = load([tmp_path])
    assert record.samples(METRIC) == tuple(row.samples[METRIC])
    assert record.samples("other_us") == (1.0,)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        load([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"no rows\.jsonl in"):
        load([tmp_path])
    (tmp_path / ROWS_FILE).write_text(json.dumps({"status": "unheard of"}) + "\n")
    with pytest.raises(ConfigError, match="no rows: "):
        load([tmp_path])


@pytest.mark.parametrize(
    "part", ["config", "environment", "checks", "reasons", "metrics", "samples", "finished"]
)
def test_a_row_that_another_program_wrote_wrongly_is_named_with_what_is_wrong(
    tmp_path: Path, part: str
) -> None:
    path = write_rows(tmp_path / ROWS_FILE, row_of(config_of("fa3"), noisy(1.0)), row_of(config_of("triton")))
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | {part: None})}\n")
    records, notes = load([tmp_path])
    assert [record.config["backend.name"] for record in records] == ["fa3"]
    assert any(f"{path}:2 is not a row and was skipped (its {part} is null, not " in note for note in notes)


@pytest.mark.parametrize("samples", [[1, None, "x"], None, "abc", {"a": 1}, [1.0, "nan"], [10**400], [True]])
def test_samples_that_are_no_numbers_are_dropped_and_named(tmp_path: Path, samples: object) -> None:
    rows = [row_of(config_of(name), noisy(1.0)) for name in ("fa3", "triton")]
    for row in rows:
        row.samples = {METRIC: noisy(1.0)}
    path = write_rows(tmp_path / ROWS_FILE, *rows)
    first, second = map(json.loads, path.read_text().splitlines())
    second["samples"][METRIC] = samples
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    found = compare([tmp_path], "backend")
    assert [number.how for number in found.cells[0].measured.values()] == [How.bootstrap, How.rough]
    (note,) = found.notes
    assert f"{path}:2: the samples of {METRIC}" in note


def test_numbers_no_float_can_hold_and_odd_packages_end_nothing(tmp_path: Path) -> None:
    rows = [
        row_of(
            config_of(name),
            noisy(1.0),
            huge_us=10**400,
            flag=True,
            nested={"a": 1},
            environment={"packages": [1]},
        )
        for name in ("fa3", "triton")
    ]
    rows[0].reasons = [1, None]  # type: ignore[list-item]
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    assert "huge_us" not in found.other_metrics
    assert sum("environment.packages is no object" in note for note in found.notes) == 2
    assert "| 1; None |" in write_markdown(found, tmp_path).read_text()


def test_files_under_other_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").write_text("{}\n")
    write_series(tmp_path, [1.0])
    with pytest.raises(
        ConfigError, match=rf"no rows\.jsonl in .*give them by name: {tmp_path}/calls\.jsonl$"
    ):
        load([tmp_path])


def test_what_is_wrong_with_a_line_is_said_in_words(tmp_path: Path) -> None:
    lines = ['{"metrics": {}}', '{"status": 3}', "null", '{"status": "ok", "conf']
    (tmp_path / ROWS_FILE).write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="no rows: ") as caught:
        load([tmp_path])
    said = [note.partition("skipped ")[2] for note in caught.value.__notes__]
    known = "not one of ok, unsupported, oom, inaccurate, suspect, error"
    assert said[:3] == [
        f"(its status is null, {known})",
        f"(its status is 3, {known})",
        "(it is no JSON object)",
    ]
    assert said[3].startswith("(no JSON, as where a run was killed: ")


def test_a_row_of_a_status_that_is_unknown_here_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / ROWS_FILE, row_of(config_of("fa3"), noisy(1.0)), row_of(config_of("triton")))
    path.write_text(path.read_text().replace('"status": "ok"', '"status": "postponed"', 1))
    records, notes = load([tmp_path])
    assert [record.config["backend.name"] for record in records] == ["triton"]
    assert any("postponed" in note for note in notes)
