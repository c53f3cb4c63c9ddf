"""Kernels of known duration, for the self-test of timers: NVIDIA GPUs only, where the device has a clock of its own.

Legend: N words of a buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

LINE = 16  # int64 words of a line of 128 bytes


@triton.jit
def hold_kernel(took_ptr, nanoseconds):
    begin = globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = globaltimer()
    tl.store(took_ptr, now - begin)


@triton.jit
def chase_kernel(next_ptr, took_ptr, end_ptr, steps):
    begin = globaltimer()
    at = tl.zeros((), tl.int64)
    for _ in range(steps):
        at = tl.load(next_ptr + at)
    tl.store(end_ptr, at)  # waits for the last load, so the clock is read after it
    tl.debug_barrier()
    tl.store(took_ptr, globaltimer() - begin)


def hold(took: Tensor, microseconds: float) -> None:
    """Keep one multiprocessor for this long; `took` (int64 [1]) gets the nanoseconds by the device's own clock."""
    hold_kernel[(1,)](took, int(microseconds * 1e3), num_warps=1)


def chase(next_N: Tensor, took: Tensor, end: Tensor, steps: int) -> None:
    """Follow `next_N` (int64, each word the index of the next) from word 0 for so many dependent loads; `took` (int64
    [1]) gets the nanoseconds, `end` (int64 [1]) where it led."""
    chase_kernel[(1,)](next_N, took, end, steps, num_warps=1)
