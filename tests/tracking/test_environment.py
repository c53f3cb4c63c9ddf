"""The environment of a row: enough to explain a number, nothing that names a host, and no need for a GPU or git."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fa_research.tracking import environment

ROOT = Path(__file__).resolve().parents[2]


def test_it_names_versions_and_the_processor() -> None:
    import torch

    facts = environment()
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]
    assert facts["cpu_count"] == os.cpu_count()
    assert facts["cpu_threads"] == torch.get_num_threads()


def test_it_names_neither_host_nor_user_nor_folders() -> None:
    text = json.dumps(environment())
    assert socket.gethostname() not in text
    assert str(ROOT) not in text


def test_the_commit_is_the_one_checked_out() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    assert environment()["git_commit"] == head.stdout.strip()
    assert environment()["git_dirty"] in (True, False)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_copy_without_history_is_told_its_commit(dirty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA_RESEARCH_COMMIT", "0123abc" + "-dirty" * dirty)
    git = sys.modules[environment.__module__]._git
    git.cache_clear()
    try:
        facts = environment()
    finally:
        git.cache_clear()
    assert (facts["git_commit"], facts["git_dirty"]) == ("0123abc", dirty)


def test_it_works_without_git_gpu_and_torch(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from fa_research.tracking.environment import environment\n"
        "print(json.dumps(environment()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}  # no git, no nvidia-smi to be found
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["git_commit"] is None
    assert facts["git_dirty"] is None
    assert facts["gpu"] is None


@pytest.mark.gpu
def test_the_gpu_is_described() -> None:
    import torch

    facts = environment()
    assert facts["gpu"] == torch.cuda.get_device_name()
    assert facts["gpu_memory_bytes"] > 2**30
    assert facts["cuda"] == torch.version.cuda
    assert facts["gpu_driver"]
