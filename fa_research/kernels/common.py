"""What the two attention kernels share: the mask's first key, scores in base 2, and the gather through the
page table.

Keys are walked in tiles of BLOCK_N that start at multiples of BLOCK_N, so that a tile never straddles a page
when the page is a multiple of the tile, and a page never straddles a tile when the tile is a multiple of the
page.

A head is a row of BLOCK_D columns, HEAD_DIM of them its own: the others are zeros that nobody loads or stores. Where
the head dim is a power of two from 16 on, the code has no trace of them. K and V of heads that lie at multiples of 16
elements are copied 16 bytes at a time; at others Triton knows no alignment and copies element by element."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The running maximum starts here and not at -inf: masked scores are -inf, and -inf - (-inf) would be NaN.
LOWEST = tl.constexpr(-1.0e30)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`; 2 on the CPU, where the interpreter runs programs one after the other."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may be started while the one before it still runs (programmatic dependent launch,
    Hopper on)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether tiles may be those of Hopper: 227 KiB of shared memory for a program, and wgmma."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def block_dim(head_dim: int) -> int:
    """Columns of a tile of a head: the next power of two, as Triton wants it, and at least the 16 of matrix
    products."""
    return max(triton.next_power_of_2(head_dim), 16)


@triton.jit
def first_allowed(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First key that a query at `position` may see. The caller applies the upper bound, causal or not."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(first, position - (WINDOW - 1))
    if CHUNK > 0:
        first = tl.maximum(first, tl.maximum(position, 0) // CHUNK * CHUNK)
    return first


@triton.jit
def online_softmax(scores, norm, peak, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """One step of the running softmax over raw scores q.k: weights, factor of what was summed before, norm
    and peak.

    Exponents are in base 2: without a softcap the scale is then one fused multiply-add in front of exp2 (it
    must be positive, because the maximum is taken before it)."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)) is right at both ends: exp2 goes to inf and to 0 there. -inf stays -inf.
        doubled = tl.exp2(scores * (scale / softcap * (2.0 * LOG2E)))
        capped = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + doubled))
        scores = tl.where(scores > float("-inf"), capped, scores)
        factor = 1.0
    else:
        factor = scale * LOG2E
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    return p, shrink, norm * shrink + tl.sum(p, 1), new_peak


@triton.jit
def sink_factor(sinks, lse2):
    """What one more logit in the denominator does to a normalised result: sigmoid(lse - sink). lse2 is in base 2."""
    seen = lse2 > float("-inf")
    return tl.where(
        seen, 1.0 / (1.0 + tl.exp2(sinks.to(tl.float32) * LOG2E - tl.where(seen, lse2, 0.0))), 0.0
    )


@triton.jit
def load_pages(table_ptr, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Page ids of the tile at key `start`: one scalar if a page holds the tile, else one a key; 0 from `end`
    on."""
    keys = start
    if PAGE_SIZE % BLOCK_N != 0:
        keys += tl.arange(0, BLOCK_N)
    if MASKED:
        return tl.load(table_ptr + keys // PAGE_SIZE, mask=keys < end, other=0)
    else:
        return tl.load(table_ptr + keys // PAGE_SIZE)


@triton.jit
def head_mask(live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of [rows, BLOCK_D]: the rows that are `live`, and of them what belongs to the head: behind it lies the next
    one. Where nothing is padded the mask is that of the rows, and costs nothing a column."""
    if BLOCK_D == HEAD_DIM:
        return live[:, None]
    else:
        return live[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def load_tile(
    base_ptr,
    pages,
    start,
    first,
    end,
    STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """K or V of the keys [start, start + BLOCK_N) of one head; with MASKED, zeros outside [first, end). Zeros from
    HEAD_DIM on.

    Slots outside may hold NaN, and 0 * NaN is NaN: they must not be read at all. Offsets are 64 bits wide: a
    pool has more than 2**31 elements. The stride of a slot is a constant, so that they cost a shift."""
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    if PAGE_SIZE % BLOCK_N == 0:
        origin = base_ptr + (pages * PAGE_SIZE + start % PAGE_SIZE).to(tl.int64) * STRIDE
        pointers = origin + ((rows * STRIDE)[:, None] + cols[None, :])
    else:
        if BLOCK_N % PAGE_SIZE == 0:
            within = rows % PAGE_SIZE
        else:
            within = (start + rows) % PAGE_SIZE
        slots = pages * PAGE_SIZE + within
        pointers = base_ptr + (slots.to(tl.int64) * STRIDE)[:, None] + cols[None, :]
    if MASKED:
        live = (start + rows >= first) & (start + rows < end)
        return tl.load(pointers, mask=head_mask(live, HEAD_DIM, BLOCK_D), other=0.0)
    elif BLOCK_D == HEAD_DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(cols < HEAD_DIM)[None, :], other=0.0)
