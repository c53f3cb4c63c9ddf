"""What kind of row an exception becomes."""

from __future__ import annotations

import pytest
import torch

from fa_research.errors import BackendUnavailable, ConfigError, KVCacheFull, Unsupported
from fa_research.tracking import Status, failed_row


@pytest.mark.parametrize(
    ("error", "status", "reasons"),
    [
        (
            BackendUnavailable("fa3", ["no GPU", "no package"], ["torch"]),
            Status.unsupported,
            ["no GPU", "no package"],
        ),
        (Unsupported("fa2", ["head dim 512"]), Status.unsupported, ["head dim 512"]),
        (ConfigError("kv.page_size=0"), Status.error, ["kv.page_size=0"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_status_and_reasons(error: Exception, status: Status, reasons: list[str]) -> None:
    row = failed_row(error, {"seed": 0}, "0a1b2c3d")
    assert (row.status, row.reasons) == (status, reasons)
    assert (row.config, row.config_hash) == ({"seed": 0}, "0a1b2c3d")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("tried to\nallocate"),
            "out of memory: OutOfMemoryError: tried to allocate; ",
        ),
        (MemoryError(), "out of memory: MemoryError; "),  # Python's own says nothing
        (
            RuntimeError("CUDA error: out of memory"),
            "out of memory: RuntimeError: CUDA error: out of memory; ",
        ),
    ],
)
def test_out_of_memory_names_what_would_take_less(error: Exception, said: str) -> None:
    row = failed_row(error)
    assert row.status is Status.oom
    (reason,) = row.reasons
    assert reason.startswith(said)
    assert "kv.num_pages" in reason


def test_a_full_cache_is_out_of_memory_and_says_how_full() -> None:
    row = failed_row(KVCacheFull(12, 3))
    assert row.status is Status.oom
    assert "12 pages requested, 3 pages free" in row.reasons[0]


def test_a_bug_names_its_place() -> None:
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        row = failed_row(error)
    assert row.status is Status.error
    assert row.reasons[0].startswith("RuntimeError: boom (test_failures.py:")
