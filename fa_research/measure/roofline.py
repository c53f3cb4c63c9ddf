"""The roof, measured on the GPU at hand: copy bandwidth and matrix rate on random data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from fa_research.config import L2State
from fa_research.measure.timing import Timer

_COPY_BYTES = 1 << 30
_MATRIX = 8192


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes per second that a copy moves (read and written), and operations per second of a matrix product."""

    bytes_per_s: float
    flops_per_s: float


@cache
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Once per process, device and dtype; about 50 ms."""
    timer = Timer(device, warmup=3, max_seconds=2.0, l2=L2State.warm)
    source = torch.randint(-128, 127, (_COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = timer.time(lambda: target.copy_(source), 10)
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    product = timer.time(lambda: a @ b, 10)
    return Roof(2 * _COPY_BYTES / copy.median_us * 1e6, 2 * _MATRIX**3 / product.median_us * 1e6)
