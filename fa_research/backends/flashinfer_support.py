"""Where FlashInfer can run, and what `backend.options` it takes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

from fa_research.backends.base import BackendSettings
from fa_research.backends.devices import reasons_against_ampere, reasons_against_hopper
from fa_research.errors import ConfigError

IMPLEMENTATIONS = ("auto", "fa2", "fa3")


def read_options(settings: BackendSettings) -> tuple[str, bool | None]:
    """The kernels of extends, and whether decode takes tensor cores (None: as the heads suggest). Raises ConfigError
    for other values."""
    implementation = settings.options.get("implementation", "auto")
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"backend.options.implementation={implementation}: choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    tensor_cores = settings.options.get("tensor_cores", "auto")
    if tensor_cores not in ("auto", True, False):
        raise ConfigError(f"backend.options.tensor_cores={tensor_cores}: choose one of auto, true, false")
    return implementation, None if tensor_cores == "auto" else bool(tensor_cores)


def _device_reasons(settings: BackendSettings) -> Iterator[str]:
    yield from (reasons := reasons_against_ampere(settings.device))
    if not reasons and settings.options.get("implementation") == "fa3":
        for reason in reasons_against_hopper(settings.device):
            yield f"backend.options.implementation=fa3: {reason}"


def on_hopper(device: torch.device) -> bool:
    """False without a GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def installed_version() -> str:
    """For notes; the package need not be there."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return "of unknown version"


def import_flashinfer() -> ModuleType:
    """The package; what its dependencies warn of on import is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("flashinfer")


def reasons_unavailable(settings: BackendSettings) -> tuple[str, ...]:
    """Everything that this machine lacks."""
    reasons = list(_device_reasons(settings))
    if importlib.util.find_spec("flashinfer") is None:
        reasons.append('the flashinfer package is not installed (pip install -e ".[flashinfer]")')
    reasons += _compiler_reasons()
    if not reasons:  # importing it without a GPU says nothing useful
        try:
            import_flashinfer()
        except Exception as error:  # its own dependencies, or a CUDA that does not fit
            reasons.append(f"importing flashinfer failed: {error}")
    return tuple(reasons)


def _compiler_reasons() -> tuple[str, ...]:
    """Why FlashInfer cannot compile its kernels here, if they have not come compiled."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return ()
    reasons = []
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") if named is None else None
    if found is None and not (Path(named or "/usr/local/cuda") / "bin" / "nvcc").exists():
        reasons.append(
            "compiles its kernels when they are first used, and there is no nvcc (CUDA toolkit; set CUDA_HOME)"
        )
    if shutil.which("ninja") is None:
        reasons.append("compiles its kernels with ninja, which is not on the PATH (pip install ninja)")
    return tuple(reasons)
