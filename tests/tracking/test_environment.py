"""The environment of a row: enough to explain a number, nothing that names a host, and no need for a GPU or git."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with the package in it, which `environment` takes for its own."""
    for name in ("fa_research/__init__.py", "configs/config.yaml", "README.md", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("outputs\n" if name == ".gitignore" else "")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "first")
    module = sys.modules[environment.__module__]
    monkeypatch.setattr(module, "_REPOSITORY", tmp_path)
    monkeypatch.delenv("FA_RESEARCH_COMMIT", raising=False)
    module._git.cache_clear()
    yield tmp_path
    module._git.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("untracked", "dirty"),
    [
        ("fa_research/backends/mine.py", True),
        ("mine.py", True),
        ("mine.cu", True),
        ("configs/experiment/mine.yaml", True),
        ("notes.txt", False),
        ("sweep/0/.hydra/config.yaml", False),
        ("outputs/mine.py", False),
    ],
)
def test_untracked_code_makes_a_tree_dirty(untracked: str, dirty: bool, checkout: Path) -> None:
    (checkout / untracked).parent.mkdir(parents=True, exist_ok=True)
    (checkout / untracked).write_text("")
    facts = environment()
    assert (facts["git_commit"], facts["git_dirty"]) == (git(checkout, "rev-parse", "HEAD"), dirty)


def test_the_commit_of_another_project_is_not_told(checkout: Path) -> None:
    """As where the package is installed into a virtual environment that lies in a repository."""
    git(checkout, "rm", "-q", "--cached", "fa_research/__init__.py")
    facts = environment()
    assert (facts["git_commit"], facts["git_dirty"]) == (None, None)


def test_a_repository_that_the_environment_names_is_not_meant(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git sets GIT_DIR for its hooks, and for what they start."""
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert environment()["git_commit"] == head


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
