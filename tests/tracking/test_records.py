"""Rows: strict JSON, on disk when `write` returns, readable after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status, read_rows

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write(path: Path, *rows: Row) -> None:
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


@given(config=st.dictionaries(st.text(), PLAIN, max_size=4), notes=st.lists(st.text()))
def test_a_row_comes_back_as_it_was(config: dict, notes: list[str]) -> None:
    row = Row(Status.ok, config=config, config_hash="0a1b2c3d", metrics={"decode_us": 1.5}, notes=notes)
    row.samples = {"decode_us": [1.25, 1.5, 2.0]}
    line = row.to_json()
    assert "\n" not in line
    assert Row.from_json(line) == row


def test_rows_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / ROWS_FILE
    write(path, Row(Status.ok, config={"i": 0}), Row(Status.unsupported, reasons=["no GPU"]))
    write(path, Row(Status.oom, config={"i": 2}))
    assert [row.status for row in read_rows(path)] == [Status.ok, Status.unsupported, Status.oom]


def test_what_is_not_finite_is_text_in_the_file_and_a_number_again_in_memory(tmp_path: Path) -> None:
    path = tmp_path / ROWS_FILE
    metrics = {"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}
    write(path, Row(Status.inaccurate, metrics=metrics, checks={"max_err": math.nan}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["metrics"] == {"nan": "nan", "up": "inf", "down": "-inf", "fine": 1.0}
    assert data["checks"] == {"max_err": "nan"}
    (row,) = read_rows(path)
    assert math.isnan(row.metrics["nan"])
    assert row.metrics["up"] == math.inf
    assert row.metrics["down"] == -math.inf


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    class Colour(Enum):
        red = "red"

    metrics = {
        "numpy": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.tensor(2.5),
        "not_finite": torch.tensor(math.nan),
        "enum": Colour.red,
        "path": Path("a/b"),
    }
    line = json.loads(Row(Status.ok, metrics=metrics).to_json())
    assert line["metrics"] == {
        "numpy": 0.5,
        "array": [0, 1, 2],
        "tensor": 2.5,
        "not_finite": "nan",
        "enum": "red",
        "path": "a/b",
    }


@pytest.mark.parametrize(
    "torn", ['{"status": "ok", "conf', "null", '{"status": "splendid"}', "\\x00\\xff", "[1]"]
)
def test_a_torn_line_is_skipped_with_a_warning_and_swallows_no_later_row(tmp_path: Path, torn: str) -> None:
    path = tmp_path / ROWS_FILE
    write(path, Row(Status.ok, config={"i": 0}))
    with path.open("ab") as file:
        file.write(torn.encode().decode("unicode_escape").encode("latin-1"))
    write(path, Row(Status.ok, config={"i": 1}))  # the next run of a killed one
    with pytest.warns(UserWarning, match=r"rows\.jsonl:2 is not a row"):
        rows = read_rows(path)
    assert [row.config["i"] for row in rows] == [0, 1]


def test_rows_of_an_earlier_version_have_no_samples() -> None:
    assert Row.from_json('{"status": "ok", "metrics": {"a_us": 1.0}}').samples == {}


def test_keys_of_a_later_version_are_dropped() -> None:
    data = json.loads(Row(Status.ok).to_json()) | {"invented_later": 1}
    assert Row.from_json(json.dumps(data)).status is Status.ok


def test_each_row_is_synced_and_a_new_file_syncs_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []  # what was synced, and how many rows the file had by then
    path, real_fsync = tmp_path / ROWS_FILE, os.fsync

    def spy(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, path.read_bytes().count(b"\n")))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    write(path, Row(Status.ok), Row(Status.ok))
    assert synced == [(tmp_path.name, 0), (ROWS_FILE, 1), (ROWS_FILE, 2)]


def test_kill_9_in_the_middle_of_a_run_keeps_the_completed_rows(tmp_path: Path) -> None:
    path = tmp_path / ROWS_FILE
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fa_research.tracking.records import Row, RowWriter, Status\n"
        "writer = RowWriter(Path(sys.argv[1]))\n"
        "for i in range(3):\n"
        "    writer.write(Row(Status.ok, config={'i': i}))\n"
        'writer._file.write(b\'{"status": "ok\')\n'  # the fourth row is on its way
        "writer._file.flush()\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    with pytest.warns(UserWarning, match="is not a row"):
        rows = read_rows(path)
    assert [row.config["i"] for row in rows] == [0, 1, 2]


def test_times_are_iso_with_a_zone() -> None:
    assert Row(Status.ok).started.endswith("+00:00")
