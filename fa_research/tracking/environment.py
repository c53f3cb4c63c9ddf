"""What a row says of the machine and the software: enough to explain a number, nothing that names a host or a user."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fa_research.fingerprint import fingerprint

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = (
    *("torch", "triton", "numpy", "hydra-core", "wandb", "transformers", "jax"),
    *("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flash-attn", "flash_attn_3", "flash-attn-4"),
    *("nvidia-cutlass-dsl", "flashinfer-python", "flashinfer-jit-cache", "sgl-kernel", "vllm", "kernels"),
)
NOT_TIMED = frozenset({"wandb", "hydra-core", "transformers"})  # packages that no timed call runs through
# Untracked files that are code: what Python imports, what it compiles, and the presets that Hydra composes.
_CODE = ("*.py", "*.cu", "*.cuh", "*.cpp", "configs/*.yaml", "configs/*.yml")


def environment(used: Iterable[type] | None = None) -> dict[str, Any]:
    """GPU, driver, CPU, versions, commit and fingerprint of the code as plain data; what is absent is left out or None.

    GPU and threads come from torch and are read only if torch is imported already. `used`: the classes that made the
    row, as for `fingerprint`.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "packages": dict(packages()),
        **_git(),
        "code": fingerprint(used),
        **_torch(),
    }


@cache
def packages() -> dict[str, str]:
    """Versions of the installed packages that a row may depend on, by name."""
    return {name: version for name in _PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def cpu_model() -> str:
    """The processor's name from /proc/cpuinfo, or what Python knows where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _git() -> dict[str, Any]:
    """The commit of this repository and whether files of it differ: tracked ones, or code that is neither tracked nor
    ignored. None where there is no git, or where the package lies in the repository of another project (as in its
    virtual environment). A copy without its history is told by FA_RESEARCH_COMMIT, as
    `git describe --always --dirty --abbrev=40` prints it.

    As it was when this process first asked: code that changes later is not what the process runs.
    """
    if told := os.environ.get("FA_RESEARCH_COMMIT"):
        commit = told.removesuffix("-dirty")
        return {"git_commit": commit, "git_dirty": commit != told}
    if _git_says("ls-files", "--error-unmatch", "--", "fa_research/__init__.py") is None:
        return {"git_commit": None, "git_dirty": None}
    head = _git_says("rev-parse", "HEAD")
    changed = _git_says("status", "--porcelain", "--untracked-files=no")
    untracked = _git_says("ls-files", "--others", "--exclude-standard", "--", *_CODE)
    known = None not in (head, changed, untracked)
    return {"git_commit": head, "git_dirty": bool(changed or untracked) if known else None}


def _git_says(*arguments: str) -> str | None:
    """What git prints of this repository, whatever other one the environment names (as it does within a git hook)."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return _run("git", "-C", str(_REPOSITORY), *arguments, env=own)


def _torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {"gpu": None}
    threads = {"cpu_threads": torch.get_num_threads()}  # OMP_NUM_THREADS changes a CPU's times
    if not torch.cuda.is_available():
        return {"gpu": None, **threads}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_uuid": str(getattr(properties, "uuid", "")),  # which of several
        "gpu_memory_bytes": properties.total_memory,
        "gpu_sm_count": properties.multi_processor_count,
        "gpu_compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        **threads,
    }


@cache
def _driver() -> str | None:
    versions = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0].strip() if versions else None


def _run(*command: str, env: Mapping[str, str] | None = None) -> str | None:
    """The output of a command, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
