"""How an exception becomes a row."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from fa_research.errors import CellLost, DoesNotFit, FaResearchError, KVCacheFull, Refusal
from fa_research.tracking.records import Row, Status

_LESS_MEMORY = (
    "lower the workload's batch size or lengths, kv.num_pages, kv.memory_fraction or the model's sizes"
)


def failed_row(error: BaseException, config: dict[str, Any] | None = None, config_hash: str = "") -> Row:
    """The row of a cell that raised: unsupported where a backend refused, oom where memory ran out, else error."""
    return Row(_status(error), config=config or {}, config_hash=config_hash, reasons=_reasons(error))


def _status(error: BaseException) -> Status:
    if isinstance(error, Refusal):
        return Status.unsupported
    # torch's class by name, so that telling it apart needs no torch
    if (
        isinstance(error, KVCacheFull | DoesNotFit | MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
    ):
        return Status.oom
    # torch's allocator on the CPU; CUDA where not even its context finds room
    said = ("can't allocate memory", "CUDA error: out of memory")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in said):
        return Status.oom
    return Status.error


def _reasons(error: BaseException) -> list[str]:
    if isinstance(error, Refusal | CellLost) and error.reasons:
        return list(error.reasons)
    text = " ".join(str(error).split())
    if isinstance(error, FaResearchError):
        return [text]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = ": ".join(filter(None, (type(error).__name__, text))) + place
    return [f"out of memory: {said}; {_LESS_MEMORY}" if _status(error) is Status.oom else said]
