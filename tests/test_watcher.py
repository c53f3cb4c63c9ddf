"""A single run that dies without an exception leaves a row, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fa_research.tracking import ROWS_FILE, Status, read_rows
from tests.test_cli import ROOT, SMALL, run_py

SCRIPT = """
import ctypes, logging, os, signal, sys, time
from pathlib import Path
from fa_research.isolation.watcher import watched
logging.basicConfig(format="%(message)s")
with watched(Path(sys.argv[1]), {"seed": 5}, 0):
    exec(sys.argv[2])
"""
SILENT = "its process ended without a word: it was killed from outside (SIGKILL"


def run(act: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), act]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            "ctypes.string_at(0)",
            "its process was killed by SIGSEGV (it used memory that is not its own), in ",
        ),
        ("os.abort()", "its process was killed by SIGABRT (a library gave up)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", SILENT),
        ("os.killpg(os.getpgid(0), signal.SIGKILL) if os.setpgid(0, 0) is None else 0", SILENT),
        ("os._exit(0)", SILENT),
        ("if os.fork() == 0: time.sleep(2); os._exit(0)\nos.kill(os.getpid(), signal.SIGKILL)", SILENT),
    ],
)
def test_a_death_leaves_a_row(act: str, said: str, tmp_path: Path) -> None:
    done = run(act, tmp_path)
    (row,) = read_rows(tmp_path / ROWS_FILE)
    assert row.status is Status.error and row.config == {"seed": 5}
    assert row.reasons[0].startswith(said), row.reasons
    assert f"{row.reasons[0]}; row, config and log are in {tmp_path}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("act", ["pass", "sys.exit(3)", "raise KeyboardInterrupt", "1 / 0"])
def test_whatever_ends_as_python_ends_is_left_alone(act: str, tmp_path: Path) -> None:
    done = run(act, tmp_path)
    assert not (tmp_path / ROWS_FILE).exists()
    assert "its process" not in done.stderr


def test_run_py(tmp_path: Path) -> None:
    args = [*SMALL, "device=cpu", "backend.name=crashes", "hydra.run.dir=out"]
    done = run_py(*args, cwd=tmp_path, FA_RESEARCH_PLUGINS="tests.faulty")
    assert done.returncode < 0, "what a shell says of it is true still"
    (row,) = read_rows(tmp_path / "out" / ROWS_FILE)
    assert (
        row.reasons[0].startswith("its process was killed by SIGSEGV")
        and "in act (faulty.py:" in row.reasons[0]
    )
    assert row.config["backend"]["name"] == "crashes" and row.config_hash
    said = f"row, config and log are in {tmp_path / 'out'}"
    assert said in done.stdout + done.stderr and said in (tmp_path / "out" / "fa_research.log").read_text()
