"""Fixtures and rules of every test: no accounts, no network, GPU tests skip with a reason where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.summary import lines

# Triton decides at its own import whether it interprets, and a test may import it (transformers does) before the
# package's kernels do. Devices are looked up by file, as asking torch would cost every test run four seconds.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Each shape that a test runs is compiled for it alone: quickly, then.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# JAX would otherwise take 75 % of a GPU at its first use, whoever imports it first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Tests run side by side, one per core: more threads each would only wait for one another. Read at torch's import.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    said = lines(report for reports in terminalreporter.stats.values() for report in reports)
    if said:
        terminalreporter.section("covered")
        for line in said:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def own_roof(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The roof of a GPU that other tests use meanwhile is too low to be kept for the user's next 30 days."""
    marked = request.node.get_closest_marker
    if marked("gpu") and not marked("quiet"):
        folder = tmp_path_factory.getbasetemp() / "cache"
        monkeypatch.setattr("fa_research.measure.roofline.cache_folder", lambda: folder)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test machine may have a W&B key; no test may use it, nor a developer's W&B settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX with its 64-bit types."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
