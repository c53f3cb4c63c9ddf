"""What a row says of the machine and the software: enough to explain a number, nothing that names a host or a user."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = (
    *("torch", "triton", "numpy", "hydra-core", "wandb", "transformers", "jax"),
    *("flash-attn", "flash_attn_3", "flashinfer-python", "sgl-kernel", "vllm", "kernels"),
)


def environment() -> dict[str, Any]:
    """GPU, driver, CPU, versions and commit as plain data; what is absent is left out or None.

    GPU and threads come from torch and are read only if torch is imported already.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "packages": dict(_packages()),
        **_git(),
        **_torch(),
    }


@cache
def _packages() -> dict[str, str]:
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
    """The commit of this repository and whether tracked files differ from it; None where there is no git. A copy
    without its history is told by FA_RESEARCH_COMMIT, as `git describe --always --dirty --abbrev=40` prints it.

    As it was when this process first asked: code that changes later is not what the process runs.
    """
    if told := os.environ.get("FA_RESEARCH_COMMIT"):
        commit = told.removesuffix("-dirty")
        return {"git_commit": commit, "git_dirty": commit != told}
    head = _run("git", "-C", str(_REPOSITORY), "rev-parse", "HEAD")
    status = _run("git", "-C", str(_REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": head, "git_dirty": None if status is None or head is None else bool(status)}


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


def _run(*command: str) -> str | None:
    """The output of a command, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
