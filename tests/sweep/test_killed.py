"""A sweep that is killed leaves no process behind that goes on with its cells, under any launcher of this machine."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fa_research.tracking import ROWS_FILE, read_rows
from tests.sweep.test_launchers import LAUNCHERS, has
from tests.sweep.test_sweep import REFUSED
from tests.test_cli import ROOT, SMALL, one_error_line, run_py

BASIC = pytest.param([], "fa_research_sweeper", id="basic")


def processes_with(mark: str) -> list[int]:
    """Those that have this text in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended, or is another user's
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("launcher", "plugin"), [BASIC, *LAUNCHERS[:2]])
def test_a_killed_sweep_leaves_no_process_and_goes_on_at_once(
    launcher: list[str], plugin: str, tmp_path: Path
) -> None:
    if not has(plugin):
        pytest.skip(f"{plugin} is not installed")
    gate, env = (
        tmp_path / "gate",
        {"FA_RESEARCH_PLUGINS": "tests.faulty", "FAULTY_GATE": str(tmp_path / "gate")},
    )
    gate.touch()
    args = ["-m", *SMALL, "device=cpu", "backend.name=waits", "seed=0,1", "hydra.sweep.dir=sweep", *launcher]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=tmp_path, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(gate.with_suffix(".pid").exists)
        child.kill()  # its exit status is not fetched yet, as by a shell that is busy
        wait_until(lambda: processes_with(str(gate)) in ([], [child.pid]), seconds=15)
    finally:
        child.kill()
        child.wait()
        for pid in processes_with(str(gate)):
            os.kill(pid, signal.SIGKILL)
    gate.unlink()
    done = run_py(*args, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert [len(read_rows(tmp_path / "sweep" / job / ROWS_FILE)) for job in "01"] == [1, 1]


def test_cells_that_outlive_their_sweep_keep_others_from_its_folder(tmp_path: Path) -> None:
    """As those of a queue do, whose jobs do not end with the process that waits for them."""
    (tmp_path / "sweep").mkdir()
    with (tmp_path / "sweep" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        line = one_error_line(run_py(*REFUSED, cwd=tmp_path))
    assert "hydra.sweep.dir=sweep: another process runs a sweep into it, or cells of one" in line
    assert run_py(*REFUSED, cwd=tmp_path).returncode == 1, "each cell of it is refused"
