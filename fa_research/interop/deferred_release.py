"""JAX arrays that are released only after torch's kernels have read them.

When the last tensor over an array's memory dies, kernels that read it may still wait on a stream. JAX would give the
memory to others without regard to torch's streams, so the array is kept until those streams have passed that point.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class PendingRelease:
    """An array whose tensors have died, and the streams that may still read it."""

    array: Any
    streams: tuple[torch.cuda.Stream, ...]
    events: list[torch.cuda.Event] = field(default_factory=list)

    def is_ready(self) -> bool:
        """Whether the streams have passed the point at which this was asked first."""
        if not self.events:
            self.events += [stream.record_event() for stream in dict.fromkeys(self.streams)]
        return all(event.query() for event in self.events)


_pending: deque[PendingRelease] = deque()


def keep_until_read(array: Any, tensor: Tensor) -> None:
    """Keep the array until the storage of `tensor` has died (views of it may live longer) and two streams have run what
    they hold at that moment: torch's current stream of this call, and the current stream of the moment of death, which
    differs where garbage is collected elsewhere."""
    stream = torch.cuda.current_stream(tensor.device)
    weakref.finalize(tensor.untyped_storage(), _storage_died, array, stream).atexit = False


def release_ready() -> None:
    """Release the arrays that have been read, the oldest first."""
    if not _pending or torch.cuda.is_current_stream_capturing():  # a capture allows no query of an event
        return
    for _ in range(len(_pending)):
        try:
            oldest = _pending.popleft()  # taken out first, so that no other thread handles it too
        except IndexError:
            return
        if not oldest.is_ready():
            _pending.appendleft(oldest)
            return


def _storage_died(array: Any, stream: torch.cuda.Stream) -> None:
    release = PendingRelease(array, (stream, torch.cuda.current_stream(stream.device)))
    if not torch.cuda.is_current_stream_capturing():
        release.is_ready()  # records the events now
    _pending.append(release)
    release_ready()
