"""Logits as integer keys that have their order, their weights, and a bisection over the keys.

A key is the int32 of a float32 x (order), less its lowest SHIFT bits where the type of the logits has no use for them:
a search over bfloat16 logits then has 16 bits to settle, and not 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # float32 bits that a type does not have
HIGHEST = tl.constexpr(3.4028234663852886e38)  # largest finite float32


@triton.jit
def order(x):
    """int32 keys in the order of float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """The key at or below x, int64 so that keys can be added."""
    return (order(x) >> SHIFT).to(tl.int64)


@triton.jit
def value(key, SHIFT: tl.constexpr):
    """The float32 of a key. Without meaning, bits are ones below a negative key, where those of the float are zeros."""
    key = key.to(tl.int32)
    sign = key >> 31
    key = (key << SHIFT) | (sign & ((1 << SHIFT) - 1))
    return (key ^ (sign & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def clean(x):
    """float32, with -inf for NaN, and finite where it was +inf."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(x, HIGHEST), float("-inf"))


@triton.jit
def scale_of(temperature):
    """log2(e) / temperature, finite."""
    return tl.minimum(1.4426950408889634 / temperature, HIGHEST)


@triton.jit
def weight(x, peak, scale):
    """Probability of x in units of the peak's."""
    return tl.exp2((x - peak) * scale)


@triton.jit
def bisect(x, weights, lo, hi, target, SHIFT: tl.constexpr):
    """The largest key in [lo, hi) from which on x weighs at least ``target``; lo if none."""
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        if tl.sum(tl.where(x >= value(middle, SHIFT), weights, 0)) >= target:
            lo = middle
        else:
            hi = middle
    return lo
