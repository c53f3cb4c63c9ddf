"""Sampled tokens on their way to the host, one step behind the device.

Legend: B requests.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from fa_research.config.limits import require

_PENDING = 2  # the newest step and the one before it


class TokenReader:
    """`push` starts an asynchronous copy of a step's tokens; `pop` hands out the oldest. Reading the step
    before the newest never waits for the newest. Buffers, views and events are made once: a step allocates
    nothing, and slicing would cost the host as much as the copy."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        require({"batch_size": batch_size}, least=0)
        self._on_gpu = device.type == "cuda"
        slots = _PENDING + 1  # one more than can be unread, so that no unread buffer is written
        host = torch.empty(slots, batch_size, dtype=torch.int64, pin_memory=self._on_gpu)
        self._host_B = host.unbind()
        self._events = [torch.cuda.Event() for _ in range(slots)] if self._on_gpu else []
        self._unread: deque[int] = deque(maxlen=_PENDING)  # slots; the oldest is dropped
        self._next = 0

    def __len__(self) -> int:
        return len(self._unread)

    def push(self, tokens_B: Tensor) -> None:
        """Remember this step's tokens, int64 [B]. Of steps that nobody reads, the oldest are dropped."""
        slot = self._next
        self._host_B[slot].copy_(tokens_B, non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()
        self._unread.append(slot)
        self._next = (slot + 1) % len(self._host_B)

    def pop(self) -> list[int]:
        """The oldest unread step's tokens, waiting for that step alone."""
        slot = self._unread.popleft()
        if self._on_gpu:
            self._events[slot].synchronize()
        tokens: list[int] = self._host_B[slot].tolist()
        return tokens
