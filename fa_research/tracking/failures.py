"""How an exception becomes a row."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa_research.discovery import is_plugin_file
from fa_research.errors import CellLost, DoesNotFit, FaResearchError, KVCacheFull, Refusal
from fa_research.tracking.records import Row, Status

_PACKAGE = Path(__file__).parents[1]
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
    frame = author_frame(error)
    place = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
    said = ": ".join(filter(None, (type(error).__name__, text))) + place
    return [f"out of memory: {said}; {_LESS_MEMORY}" if _status(error) is Status.oom else said]


def author_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Where the author of what failed would look first, as `author_file`; None for an error that was never raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[author_file([frame.filename for frame in frames])] if frames else None


def author_file(files: Sequence[str]) -> int:
    """Which of the files of a stack, outermost first, its reader wrote: the innermost that belongs to a plugin; else to
    this package; else the innermost. As an index from the end: -1 is the last."""
    plugin = [i for i, file in enumerate(files) if is_plugin_file(file)]
    ours = [i for i, file in enumerate(files) if Path(file).is_relative_to(_PACKAGE)]
    return (plugin or ours or [len(files) - 1])[-1] - len(files)


def log_bug(log: logging.Logger, error: BaseException) -> None:
    """The traceback of an error that no user's mistake explains, and last the line in the author's own file, which
    the frames of libraries below it would hide."""
    log.error("the run failed", exc_info=error)
    frame, frames = author_frame(error), traceback.extract_tb(error.__traceback__)
    if frame is not None and (frame.filename, frame.lineno) != (frames[-1].filename, frames[-1].lineno):
        log.error("raised by %s, line %s, in %s: %s", frame.filename, frame.lineno, frame.name, frame.line)
