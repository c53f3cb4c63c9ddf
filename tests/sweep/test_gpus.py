"""GPUs are shared out by locks of files: one worker on each while there are enough, one cell at a time on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa_research.isolation import gpus
from fa_research.isolation.gpus import GpuShare
from fa_research.tracking import ROWS_FILE, Row, Status, read_rows
from tests.sweep.test_launchers import has
from tests.test_cli import SMALL, run_py

UUIDS = ["GPU-aaaa", "GPU-bbbb"]

HOLDER = """
import sys, time
from pathlib import Path
from fa_research.isolation.gpus import GpuShare
share = GpuShare(sys.argv[2:], Path(sys.argv[1]))
with share.turn(print):
    print(share.uuid, flush=True)
    time.sleep(600)
"""


def holder(folder: Path, *uuids: str) -> subprocess.Popen[str]:
    """Another process that runs a cell on a GPU of these."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *uuids], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(gpus.__file__).parents[2])},
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_two_processes_take_a_gpu_each_and_do_not_wait(tmp_path: Path) -> None:
    with holder(tmp_path, *UUIDS) as other:
        share, said = GpuShare(UUIDS, tmp_path), []
        assert share.uuid == "GPU-bbbb" and share.alone
        with share.turn(said.append):
            pass
        assert said == []
        other.kill()
    share.close()
    again = GpuShare(UUIDS, tmp_path)
    assert again.uuid == "GPU-aaaa", "what a killed process had is free again"
    again.close()


def test_a_cell_waits_for_the_one_that_is_on_its_gpu(tmp_path: Path) -> None:
    with holder(tmp_path, UUIDS[0]) as other:
        share, said = GpuShare(UUIDS[:1], tmp_path), []
        assert share.uuid == UUIDS[0] and not share.alone
        other_ended = []

        def say(text: str) -> None:
            said.append(text)
            other.kill()
            other_ended.append(other.wait())

        with share.turn(say):
            assert other_ended, "the turn came only after the other had ended"
    assert "waiting for GPU-aaaa" in said[0]


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, UUIDS),
        ("1", UUIDS[1:]),
        ("1,0", UUIDS[::-1]),
        ("GPU-b", UUIDS[1:]),
        ("", []),
        ("-1", []),
        ("0,7,1", UUIDS[:1]),
    ],
)
def test_cuda_visible_devices_says_which(
    asked: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands where the driver's program stands; what is tested is how its answer is read.
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-aaaa\necho GPU-bbbb\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if asked is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    gpus._installed_gpus.cache_clear()
    try:
        assert gpus.visible_gpus() == seen
    finally:
        gpus._installed_gpus.cache_clear()


def test_cells_on_the_cpu_wait_for_no_gpu(tmp_path: Path) -> None:
    """All GPUs that this machine has, and one that it seems to have, are taken by others."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-aaaa\n")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    folder = tmp_path / f"fa_research-{os.getuid()}"
    folder.mkdir()
    with holder(folder, "GPU-aaaa") as other:
        done = run_py("-m", *SMALL, "device=cpu", "seed=0,1", cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert "waiting" not in done.stdout
        other.kill()


def rows_of_two_processes(tmp_path: Path, **env: str) -> list[Row]:
    """Four cells on the GPU in a sweep of two processes, in the order of their starts."""
    if not has("hydra_joblib_launcher"):
        pytest.skip("hydra_joblib_launcher is not installed")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    env["XDG_CACHE_HOME"] = str(tmp_path)  # a roof measured beside other tests is not for keeping
    done = run_py("-m", *SMALL, "device=cuda", "seed=range(4)", *launcher, cwd=tmp_path, timeout=280, **env)
    assert done.returncode == 0, done.stderr
    rows = sorted(read_rows(tmp_path / "sweep" / ROWS_FILE), key=lambda row: row.started)
    assert [row.status for row in rows] == [Status.ok] * 4
    return rows


@pytest.mark.gpu
def test_two_processes_on_one_gpu_run_their_cells_in_turn(tmp_path: Path) -> None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    rows = rows_of_two_processes(tmp_path, CUDA_VISIBLE_DEVICES=first)
    for before, after in zip(rows, rows[1:], strict=False):
        assert before.finished <= after.started


@pytest.mark.gpu
def test_two_processes_on_two_gpus_have_one_each(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rows = rows_of_two_processes(tmp_path)
    assert len({row.environment["gpu_uuid"] for row in rows}) == 2
    assert any(after.started < before.finished for before, after in zip(rows, rows[1:], strict=False))
