"""JAX arrays whose memory torch kernels may still read when the last tensor of it dies. JAX would give the memory away
without regard to torch's streams, so the array stays until they have passed that point."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class _Left:
    array: Any
    streams: tuple[torch.cuda.Stream, ...]
    events: list[torch.cuda.Event] = field(default_factory=list)

    def was_read(self) -> bool:
        if not self.events:
            self.events += [stream.record_event() for stream in dict.fromkeys(self.streams)]
        return all(event.query() for event in self.events)


_left: deque[_Left] = deque()


def keep_until_read(array: Any, tensor: Tensor) -> None:
    """Keep the array until its storage has died (views of `tensor` may outlive it) and the streams have run what they
    then hold: torch's current one now, and the one at that time, which may be another's where garbage is collected."""
    stream = torch.cuda.current_stream(tensor.device)
    weakref.finalize(tensor.untyped_storage(), _leave, array, stream).atexit = False


def let_go() -> None:
    """Of the arrays that were read."""
    if not _left or torch.cuda.is_current_stream_capturing():  # which allows no question about an event
        return
    for _ in range(len(_left)):
        try:
            oldest = _left.popleft()  # first, so that no other thread asks about it
        except IndexError:
            return
        if not oldest.was_read():
            _left.appendleft(oldest)
            return


def _leave(array: Any, stream: torch.cuda.Stream) -> None:
    left = _Left(array, (stream, torch.cuda.current_stream(stream.device)))
    if not torch.cuda.is_current_stream_capturing():
        left.was_read()  # marks the point
    _left.append(left)
    let_go()
