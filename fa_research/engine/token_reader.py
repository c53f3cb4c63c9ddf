"""Sampled tokens on their way to the host, one step behind the device.

Legend: B requests.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class TokenReader:
    """`push` starts an asynchronous copy of a step's tokens; `pop` hands out the oldest. Reading the step before the
    newest never waits for the newest."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.max_pending = 2

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, tokens_B: Tensor) -> None:
        """Remember this step's tokens. Steps that nobody read are dropped, oldest first, so that a caller who wants no
        tokens pays nothing for them."""
        if len(self._pending) == self.max_pending:
            self._pending.popleft()
        if not self._on_gpu:
            self._pending.append((tokens_B.clone(), None))
            return
        host = torch.empty(tokens_B.shape, dtype=tokens_B.dtype, pin_memory=True)
        host.copy_(tokens_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))

    def pop(self) -> list[int]:
        """The oldest unread step's tokens, waiting for that step alone."""
        tokens, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return tokens.tolist()
