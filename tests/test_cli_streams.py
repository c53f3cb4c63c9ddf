"""The command line where its output goes nowhere: streams closed by who started it, or on a disk that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status, read_rows
from tests.test_cli import ROOT, SMALL, run_py

# Refused by the config's check, so that no worker starts.
REFUSED = ["-m", *SMALL, "hydra.sweep.dir=sweep", "kv.page_size=300,301", "sweep.report=true"]


def python(*args: str, cwd: Path, to: str) -> subprocess.CompletedProcess[str]:
    """Python under a shell's redirection `to`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {to}', sys.executable, *args],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("to", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_sweep_without_streams_runs(to: str, tmp_path: Path) -> None:
    args = ["-m", *SMALL, "device=cpu", "seed=0,1", "hydra.sweep.dir=sweep"]
    done = python(str(ROOT / "run.py"), *args, cwd=tmp_path, to=to)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row.status for row in read_rows(tmp_path / "sweep" / ROWS_FILE)] == [Status.ok] * 2


@pytest.mark.parametrize(
    ("to", "said"), [("> /dev/full", ["cannot write to stdout: No space left on device; going on without"]),
                     ("> /dev/full 2>&1", [])],
)  # fmt: skip
def test_a_full_disk_under_the_screen_costs_the_screen_alone(
    to: str, said: list[str], tmp_path: Path
) -> None:
    done = python(str(ROOT / "run.py"), *REFUSED, cwd=tmp_path, to=to)
    assert done.stderr.splitlines() == said
    assert done.returncode == 1, "both cells are refused"
    assert len(read_rows(tmp_path / "sweep" / ROWS_FILE)) == 2
    assert (tmp_path / "sweep" / "report.html").exists()


def test_text_goes_on_where_the_disk_under_it_is_full(tmp_path: Path) -> None:
    args = [
        "tracking=disabled",
        "measure=quick",
        "hydra.run.dir=out",
        "workload.generate=4",
        "workload.steps=2",
    ]
    done = python(
        str(ROOT / "run.py"),
        *args,
        "workload.prompt=a",
        "workload.batch_size=1",
        cwd=tmp_path,
        to="> /dev/full",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write to stdout") == 1 == len(done.stderr.splitlines())
    assert [row.status for row in read_rows(tmp_path / "out" / ROWS_FILE)] == [Status.ok]


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-"])
def test_an_error_that_nobody_can_read_keeps_its_exit_code(to: str, tmp_path: Path) -> None:
    done = python(str(ROOT / "run.py"), *SMALL, "kv.page_size=300", cwd=tmp_path, to=to)
    assert done.returncode == 2


def test_a_comparison_without_stdout_ends_well(tmp_path: Path) -> None:
    with RowWriter(tmp_path / ROWS_FILE) as writer:
        for size in (1, 16):
            config = {"kv": {"page_size": size}}
            writer.write(
                Row(Status.ok, config=config, config_hash=str(size), metrics={"decode_step_us": 1.0})
            )
    args = ["-m", "fa_research.compare", str(tmp_path), "--question", "kv.page_size"]
    done = python(*args, cwd=ROOT, to=">&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_among_the_imports_is_one_line(tmp_path: Path) -> None:
    # A background job of a shell ignores the signal, and so does what it starts.
    (tmp_path / "hydra.py").write_text(
        "from signal import SIGINT, default_int_handler, raise_signal, signal\n"
        "signal(SIGINT, default_int_handler)\nraise_signal(SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", *SMALL],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_run_whose_reader_leaves_finishes_and_says_so(tmp_path: Path) -> None:
    args = [*SMALL, "device=cpu", "hydra.run.dir=out"]
    script = f'"$0" {ROOT / "run.py"} "$@" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, *args],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend=torch model=tiny device=cpu, decode (") and "out" in done.stdout
    assert done.stderr.splitlines() == [
        "nobody reads stdout any more; going on without the screen, as rows are what counts"
    ]
    assert [row.status for row in read_rows(tmp_path / "out" / ROWS_FILE)] == [Status.ok]


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('torch is imported')\nraise ImportError('no torch')\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *SMALL, "hydra.run.dir=out"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    first, second = done.stdout.splitlines()[:2]
    sizes = ["backend=torch", "batch_size=2", "context_len=32", "of memory", "results go to"]
    assert all(part in first for part in sizes) and second == "torch is imported", done.stdout


def test_an_ascii_locale_keeps_names_log_and_exit_code(tmp_path: Path) -> None:
    args = [*SMALL, "device=cpu", "study=\u00fc", "hydra.run.dir=\u00f6/${study}"]
    done = run_py(*args, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "\u00f6" / "\u00fc"
    assert [row.status for row in read_rows(folder / ROWS_FILE)] == [Status.ok]
    assert "\u00fc" in (folder / "fa_research.log").read_text(encoding="utf-8")
    assert done.stdout.isascii()
