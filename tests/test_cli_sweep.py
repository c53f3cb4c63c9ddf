"""Sweeps as a user meets them on the command line: a row for every cell, killed and gone on with, gathered."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fa_research.sweep import gather
from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status, read_rows
from tests.test_cli import ROOT, SMALL, one_error_line, run_py


def test_a_sweep_has_a_row_for_every_cell_whatever_became_of_it(tmp_path: Path) -> None:
    """Runs, refused by the config, refused by the machine, not even composable: a row each, and a table at the end."""
    args = ["-m", *SMALL, "device=cpu", "backend=torch,fa3,nosuch", "kv.page_size=4,512,x"]
    done = run_py(*args, cwd=tmp_path, COLUMNS="300")
    assert done.returncode == 1, done.stderr  # some cells are errors
    (sweep,) = (tmp_path / "outputs" / "default").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    asked = [(row.config["backend"]["name"], str(row.config["kv"]["page_size"])) for row in rows]
    assert asked == [(backend, size) for backend in ("torch", "fa3", "nosuch") for size in ("4", "512", "x")]
    assert [row.status for row in rows] == [
        Status.ok,
        *[Status.error] * 2,
        Status.unsupported,
        *[Status.error] * 5,
    ]
    assert all(row.reasons for row in rows if row.status is not Status.ok)
    for job, row in enumerate(rows):
        assert read_rows(sweep / str(job) / ROWS_FILE) == [row]
    table = done.stdout[done.stdout.index("backend.name") :]
    for part in ("kv.page_size", "unsupported", "nosuch", "from 1 to 256", "9 rows in outputs/default/"):
        assert part in table
    assert "context_len" not in table.splitlines()[0]


def test_a_sweep_over_what_cells_are_timed_against(tmp_path: Path) -> None:
    """Typed as overrides are, each cell with a second engine of its own; a mistake in one is that cell's."""
    lists = "[kv.page_size=4],[kv.page_size=4,kv.churn=false],[kv.pagesize=4]"
    done = run_py("-m", *SMALL, "device=cpu", f"measure.against={lists}", cwd=tmp_path)
    (sweep,) = (tmp_path / "outputs" / "default").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    assert [row.status for row in rows] == [Status.ok, Status.ok, Status.error], done.stderr
    assert [row.metrics.get("against") for row in rows] == [
        "kv.page_size=4",
        "kv.page_size=4, kv.churn=false",
        None,
    ]
    assert all(len(row.samples["decode_step_against_us"]) == 30 for row in rows[:2])
    assert "did you mean kv.page_size?" in rows[2].reasons[0]
    line = one_error_line(run_py(*SMALL, "measure.against=[device=cuda]", cwd=tmp_path))
    assert "measure.against=['device=cuda']: device is of the run" in line


def test_a_sweep_of_cells_that_ran_or_were_refused_by_the_machine_succeeds(tmp_path: Path) -> None:
    done = run_py("-m", *SMALL, "device=cpu", "backend=torch,fa3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_sweep_in_which_nothing_can_be_composed_is_one_line(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "kv.pagesize=1,2", cwd=tmp_path))
    assert "did you mean kv.page_size?" in line


def _wait_for_row(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_bytes().endswith(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_killed_sweep_keeps_its_rows_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "seed=0,1,2", "hydra.sweep.dir=sweep"]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "sweep" / "0" / ROWS_FILE
    _wait_for_row(first)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (kept,) = read_rows(first)
    done = run_py(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert rows[0] == kept, "the finished cell was not run again"
    assert "#0 has its row already" in done.stdout
    assert [row.config["seed"] for row in rows] == [0, 1, 2]


def test_a_torn_row_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / ROWS_FILE).write_text('{"status": "ok", "conf')
    args = ["-m", *SMALL, "device=cpu", "seed=0", "hydra.sweep.dir=sweep", "sweep.report=true"]
    done = run_py(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert text.count(f"sweep/0/{ROWS_FILE}:1 is not a row and was skipped") == 1, text
    assert "Warning" not in text and "return [" not in text


@pytest.mark.parametrize(
    ("folder", "typed"), [("my sweep", "hydra.sweep.dir=my sweep"), ("s 3, x", 'hydra.sweep.dir="s 3, x"')]
)
def test_an_interrupted_sweep_says_how_it_goes_on(folder: str, typed: str, tmp_path: Path) -> None:
    args = ["-m", *SMALL, "seed=range(40)"]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args, typed],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _wait_for_row(tmp_path / folder / "0" / ROWS_FILE)
    child.send_signal(signal.SIGINT)
    (line,) = child.communicate()[1].splitlines()
    assert child.returncode == 130
    hint = line.removeprefix("interrupted; the same command with ").removesuffix(
        " goes on from the rows made so far"
    )
    assert hint == shlex.quote(typed), "as a shell takes it"
    done = run_py(*args, "seed=0", *shlex.split(hint), cwd=tmp_path)
    assert "0 of 1 cells to run" in done.stdout, done.stderr


def test_another_config_in_the_same_sweep_folder_is_run(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    assert run_py(*args, "seed=0", cwd=tmp_path).returncode == 0
    done = run_py(*args, "seed=1", cwd=tmp_path)
    assert "has its row already" not in done.stdout
    assert [row.config["seed"] for row in read_rows(tmp_path / "sweep" / ROWS_FILE)] == [1]


def test_a_cell_that_fails_where_another_left_a_row_has_one_of_its_own(tmp_path: Path) -> None:
    """Else the sweep would show the time of the cell that ran, or why an earlier one failed."""
    args = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    assert run_py(*args, cwd=tmp_path).returncode == 0
    for refused in ("kv.num_pages=1", "kv.num_pages=2"):
        run_py(*args, refused, cwd=tmp_path)
        (row,) = read_rows(tmp_path / "sweep" / ROWS_FILE)
        assert row.status is Status.error and refused in row.reasons[0], row


def test_a_sweep_over_studies_has_one_folder(tmp_path: Path) -> None:
    done = run_py("-m", *SMALL, "study=one,two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 rows in outputs/default/" in done.stdout
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert [row.config["study"] for row in read_rows(folder / ROWS_FILE)] == ["one", "two"]


def test_a_sweep_over_presets_that_sweep_is_refused(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "experiment=first_ablation,decode_step", cwd=tmp_path))
    assert "experiment=first_ablation is a sweep of its own, over backend, kv.page_size" in line


def test_an_experiment_that_sweeps_needs_no_flag(tmp_path: Path) -> None:
    overrides = ["experiment=first_ablation", "backend=torch", "workload.context_len=32", "workload.steps=2"]
    done = run_py(*overrides, "workload.batch_size=2", "tracking=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "first_ablation").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    assert [(row.config["backend"]["name"], row.config["kv"]["page_size"]) for row in rows] == [
        ("torch", 1),
        ("torch", 16),
    ]


def test_a_sweep_whose_output_nobody_reads_comes_to_its_end(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *SMALL, "kv.page_size=300,301", "hydra.sweep.dir=sweep"],
        cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        said = child.stderr.read().decode()
    assert said == "nobody reads stdout any more; going on without the screen, as rows are what counts\n"
    assert child.returncode == 1, "as with a reader: both cells are refused"
    assert len(read_rows(tmp_path / "sweep" / ROWS_FILE)) == 2


def test_gathering_takes_the_last_row_of_each_cell_in_job_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for job in (10, 9, 1):
        (tmp_path / str(job)).mkdir()
        with RowWriter(tmp_path / str(job) / ROWS_FILE) as writer:
            writer.write(Row(Status.error, config={"job": job}))
            writer.write(Row(Status.ok, config={"job": job}))
    (tmp_path / "5" / ".hydra").mkdir(parents=True)  # died before it could write a row
    rows = gather(tmp_path)
    assert [(row.config["job"], row.status) for row in rows] == [(job, Status.ok) for job in (1, 9, 10)]
    assert "5 has no row" in caplog.text
    lines = (tmp_path / ROWS_FILE).read_text().splitlines()
    assert [json.loads(line)["config"]["job"] for line in lines] == [1, 9, 10]
    assert gather(tmp_path) == rows, "gathering again changes nothing"
