"""Sampled tokens on their way to the host, one step behind the device.

Legend: B requests.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

_PENDING = 2  # the newest step and the one before it


class TokenReader:
    """`push` starts an asynchronous copy of a step's tokens; `pop` hands out the oldest. Reading the step before the
    newest never waits for the newest. Buffers and events are made once: a step allocates nothing."""

    def __init__(self, max_batch_size: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        slots = _PENDING + 1  # one more than can be unread, so that no unread buffer is written
        self._host = torch.empty(slots, max_batch_size, dtype=torch.int64, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(slots)] if self._on_gpu else []
        self._unread: deque[tuple[int, int]] = deque(
            maxlen=_PENDING
        )  # (slot, batch size); the oldest is dropped
        self._next = 0

    def __len__(self) -> int:
        return len(self._unread)

    def push(self, tokens_B: Tensor) -> None:
        """Remember this step's tokens. Of steps that nobody reads, the oldest are dropped."""
        slot, size = self._next, tokens_B.shape[0]
        self._host[slot, :size].copy_(tokens_B, non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()
        self._unread.append((slot, size))
        self._next = (slot + 1) % len(self._host)

    def pop(self) -> list[int]:
        """The oldest unread step's tokens, waiting for that step alone."""
        slot, size = self._unread.popleft()
        if self._on_gpu:
            self._events[slot].synchronize()
        tokens: list[int] = self._host[slot, :size].tolist()
        return tokens
