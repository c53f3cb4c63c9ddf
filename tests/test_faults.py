"""What a cell does to its process costs that cell, whatever it is; a killed sweep goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fa_research.tracking import ROWS_FILE, Status, read_rows
from tests.test_cli import ROOT, SMALL, run_py

PLUGINS = {"FA_RESEARCH_PLUGINS": "tests.faulty"}
CELLS = {
    "sound_a": Status.ok,
    "raises": Status.error,
    "hungry": Status.oom,
    "sound_b": Status.ok,
    "crashes": Status.error,
    "kills_itself": Status.error,
    "hangs": Status.error,
    "exits": Status.error,
    "sound_c": Status.ok,
    "fills_the_disk": Status.error,
}
TIMEOUT = 5


def sweep_of(names: list[str], cwd: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", *SMALL, "device=cpu", f"backend.name={','.join(names)}", "hydra.sweep.dir=sweep", *args]
    return run_py(*command, cwd=cwd, **PLUGINS, **env)


REASONS = {
    "raises": ["RuntimeError: a bug of this backend"],
    "hungry": ["out of memory", "can't allocate memory"],
    "crashes": ["was killed by SIGSEGV"],
    "kills_itself": ["was killed by SIGKILL", "the last words"],
    "hangs": [f"was stopped after measure.timeout_s={TIMEOUT}"],
    "exits": ["ended with exit code 7"],
    "fills_the_disk": ["OSError", "File too large"],
}


def test_every_fault_costs_one_cell(tmp_path: Path) -> None:
    """One sweep with every fault in it, as each costs the start of a new process."""
    done = sweep_of(list(CELLS), tmp_path, f"measure.timeout_s={TIMEOUT}")
    rows = {row.config["backend"]["name"]: row for row in read_rows(tmp_path / "sweep" / ROWS_FILE)}
    assert {name: row.status for name, row in rows.items()} == CELLS, done.stdout
    assert list(rows) == list(CELLS)
    assert all(row.metrics["decode_step_us"] > 0 for row in rows.values() if row.status is Status.ok)
    assert done.returncode == 1
    for name, parts in REASONS.items():
        said = "; ".join(rows[name].reasons)
        assert all(part in said for part in parts), said
    logs = [(tmp_path / "sweep" / str(job) / "fa_research.log").read_text() for job in range(len(CELLS))]
    check_processes(dict(zip(CELLS, logs, strict=True)))
    assert [name for name, text in zip(CELLS, logs, strict=True) if "Traceback" in text] == [
        "raises",
        "fills_the_disk",
    ], "a bug has its traceback in the log of its cell"
    unwritten = list(CELLS).index("fills_the_disk")
    assert read_rows(tmp_path / "sweep" / str(unwritten) / ROWS_FILE) == []
    assert f"not on disk, which did not take them: #{unwritten}" in done.stdout


def check_processes(logs: dict[str, str]) -> None:
    """A process stays for the next cell unless it is spoilt; which one it was is in what a cell's log kept of it."""
    processes = {name: int(re.findall(r"in process (\d+)", text)[0]) for name, text in logs.items()}
    assert len({processes[name] for name in ("sound_a", "raises", "hungry", "sound_b", "crashes")}) == 1
    assert processes["sound_c"] == processes["fills_the_disk"]
    assert len(set(processes.values())) == 5


def test_a_full_disk_costs_the_cells_that_it_did_not_take(tmp_path: Path) -> None:
    """A file system of 64 KiB, on which not even Hydra can make its files after some cells."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("this system lets nobody mount a small file system in a name space of their own")
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        *SMALL,
        "device=cpu",
        "seed=range(5)",
        "hydra.sweep.dir=sweep",
    ]
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && cd "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(tmp_path), *command],
        env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "#0 ok" in done.stdout and "#4 error: OSError: [Errno 28] No space left on device" in done.stdout
    assert "5 rows in sweep" in done.stdout
    unwritten = re.search(r"not on disk, which did not take them: (.*)", done.stdout)
    assert unwritten is not None and unwritten[1].endswith("#4")
    assert "Logging error" not in done.stderr, done.stderr


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # ended, and nobody has asked how
            return
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists(), "the worker outlived its sweep"


def test_a_sweep_killed_in_mid_cell_and_resumed_equals_an_unbroken_one(tmp_path: Path) -> None:
    names, gate = ["sound_a", "waits", "sound_b"], tmp_path / "gate"
    gate.touch()
    args = ["-m", *SMALL, "device=cpu", f"backend.name={','.join(names)}", "hydra.sweep.dir=sweep"]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=tmp_path,
        env=os.environ | PLUGINS | {"FAULTY_GATE": str(gate)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun, deadline = gate.with_suffix(".pid"), time.monotonic() + 100
    while not (begun.exists() and begun.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    beside = sweep_of(names, tmp_path, FAULTY_GATE=str(gate))
    assert beside.returncode == 2 and "hydra.sweep.dir=sweep: another process runs" in beside.stderr
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _wait_until_gone(int(begun.read_text()))
    (kept,) = read_rows(tmp_path / "sweep" / "0" / ROWS_FILE)
    assert not (tmp_path / "sweep" / "1" / ROWS_FILE).exists() or not read_rows(
        tmp_path / "sweep" / "1" / ROWS_FILE
    )
    gate.unlink()
    resumed = sweep_of(names, tmp_path, FAULTY_GATE=str(gate))
    assert resumed.returncode == 0, resumed.stderr
    (tmp_path / "unbroken").mkdir()
    assert sweep_of(names, tmp_path / "unbroken", FAULTY_GATE=str(gate)).returncode == 0
    rows, unbroken = (read_rows(cwd / "sweep" / ROWS_FILE) for cwd in (tmp_path, tmp_path / "unbroken"))
    assert rows[0] == kept, "the finished cell was not run again"
    assert [(r.config_hash, r.status) for r in rows] == [(r.config_hash, r.status) for r in unbroken]
    assert len({row.config_hash for row in rows}) == len(names)


def test_a_child_of_a_dead_worker_does_not_stand_for_it(tmp_path: Path) -> None:
    done = sweep_of(["leaves_a_child"], tmp_path)
    (row,) = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert "was killed by SIGKILL" in row.reasons[0], done.stderr
    worker = re.search(r"in process (\d+)", (tmp_path / "sweep" / "0" / "fa_research.log").read_text())
    assert worker is not None
    groups = [path.read_text().rpartition(")")[2].split()[:3] for path in Path("/proc").glob("[0-9]*/stat")]
    assert not [state for state, _, group in groups if group == worker[1] and state != "Z"], (
        "the child is left"
    )


@pytest.mark.gpu
@pytest.mark.quiet  # one of them takes all memory
def test_faults_of_a_gpu_cost_one_cell_each(tmp_path: Path) -> None:
    expected = {
        "sound_a": Status.ok,
        "hungry": Status.oom,
        "sound_b": Status.ok,
        "illegal_access": Status.error,
        "sound_c": Status.ok,
        "asserts_on_the_device": Status.error,
        "sound_d": Status.ok,
    }
    command = ["-m", *SMALL, "device=cuda", f"backend.name={','.join(expected)}", "hydra.sweep.dir=sweep"]
    done = run_py(*command, cwd=tmp_path, timeout=280, XDG_CACHE_HOME=str(tmp_path), **PLUGINS)
    rows = {row.config["backend"]["name"]: row for row in read_rows(tmp_path / "sweep" / ROWS_FILE)}
    assert {name: row.status for name, row in rows.items()} == expected, done.stdout + done.stderr
    assert "illegal memory access" in "; ".join(rows["illegal_access"].reasons)
    assert "device-side assert" in "; ".join(rows["asserts_on_the_device"].reasons)
    for name in ("illegal_access", "asserts_on_the_device"):
        assert any("context was lost" in note for note in rows[name].notes), rows[name].notes
    # The process of a lost context may end by itself, when it frees memory: what counts is that another goes on.
    assert len(set(re.findall(r"in process (\d+)", done.stdout))) == 3, done.stdout
