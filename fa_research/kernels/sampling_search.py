"""The search for a threshold over a whole row, where its leading groups (sampling_threshold.py) do not decide it.

It lies between two bounds: each pass over the row counts and weighs what lies above three pivots, until so few logits
are left between that they can be looked at alone. FlashInfer's samplers search likewise, with pivots that they draw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fa_research.kernels.sampling_keys import HIGHEST, bisect, clean, key_of, value, weight

_SPAN = tl.constexpr(128.0)  # below the largest logit: pivots by value begin here at the lowest


@triton.jit
def _load(row_ptr, start, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """[LANES, WIDTH] logits, of which each thread reads 16 bytes at once."""
    ids = start + tl.arange(0, LANES * WIDTH)
    return tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _tally(row_ptr, peak, scale, vocab, a, b, c, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """How many logits lie at or above each of three values, and their mass. Each thread adds up the 16 bytes that it
    reads before the running sums, which would not fit in registers otherwise."""
    count_a, count_b, count_c = (
        tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
    )  # fmt: skip
    mass_a, mass_b, mass_c = (
        tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    )  # fmt: skip
    following = _load(row_ptr, 0, vocab, LANES, WIDTH)
    for start in range(0, vocab, LANES * WIDTH):
        # A NaN is above no pivot; +inf weighs what the largest finite number does.
        x = tl.reshape(following.to(tl.float32), [LANES, WIDTH])
        following = _load(row_ptr, start + LANES * WIDTH, vocab, LANES, WIDTH)
        mass = weight(tl.minimum(x, HIGHEST), peak, scale)
        count_a += tl.sum((x >= a).to(tl.int32), axis=1)
        count_b += tl.sum((x >= b).to(tl.int32), axis=1)
        count_c += tl.sum((x >= c).to(tl.int32), axis=1)
        mass_a += tl.sum(tl.where(x >= a, mass, 0.0), axis=1)
        mass_b += tl.sum(tl.where(x >= b, mass, 0.0), axis=1)
        mass_c += tl.sum(tl.where(x >= c, mass, 0.0), axis=1)
    return tl.sum(count_a), tl.sum(count_b), tl.sum(count_c), tl.sum(mass_a), tl.sum(mass_b), tl.sum(mass_c)


@triton.jit
def _narrow(lo, lo_count, lo_mass, hi, hi_count, hi_mass, key, count, mass, enough):
    """The bounds, given what lies from ``key`` on and whether that is enough."""
    raise_lo = enough & (key > lo)
    lower_hi = (enough == 0) & (key < hi)
    lo, hi = tl.where(raise_lo, key, lo), tl.where(lower_hi, key, hi)
    lo_count, hi_count = tl.where(raise_lo, count, lo_count), tl.where(lower_hi, count, hi_count)
    lo_mass, hi_mass = tl.where(raise_lo, mass, lo_mass), tl.where(lower_hi, mass, hi_mass)
    return lo, lo_count, lo_mass, hi, hi_count, hi_mass


@triton.jit
def _inside(x, low, high):
    """Whether x, finite or cleaned to be so, has a place in [low, high). Neither a NaN nor -inf has."""
    return ((x >= low) & ((x >= high) == 0)).to(tl.int32)


@triton.jit
def _gather(row_ptr, candidates_ptr, vocab, low, high, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The finite logits from ``low`` to below ``high``, written one after the other; how many. Each lane first counts
    its own, so that lanes wait for one another but once."""
    low = tl.maximum(low, -HIGHEST)
    high = tl.where(high > HIGHEST, float("nan"), high)  # +inf counts as HIGHEST, and nothing is above a NaN
    count = tl.zeros([LANES], tl.int32)
    following = _load(row_ptr, 0, vocab, LANES, WIDTH)
    for start in range(0, vocab, LANES * WIDTH):
        x = tl.reshape(following.to(tl.float32), [LANES, WIDTH])
        following = _load(row_ptr, start + LANES * WIDTH, vocab, LANES, WIDTH)
        count += tl.sum(_inside(x, low, high), axis=1)
    place = tl.cumsum(count) - count
    following = _load(row_ptr, 0, vocab, LANES, WIDTH)
    for start in range(0, vocab, LANES * WIDTH):
        x = tl.reshape(following.to(tl.float32), [LANES, WIDTH])
        following = _load(row_ptr, start + LANES * WIDTH, vocab, LANES, WIDTH)
        for i in tl.static_range(WIDTH):  # column i is in the registers of the lanes' threads
            column = tl.max(tl.where(tl.arange(0, WIDTH)[None, :] == i, x, float("-inf")), axis=1)
            inside = _inside(column, low, high)
            tl.store(candidates_ptr + place, column, mask=inside != 0)
            place += inside
    return tl.sum(count)


@triton.jit
def search(
    row_ptr,
    candidates_ptr,
    peak,
    scale,
    vocab,
    lo,
    lo_count,
    lo_mass,
    hi,
    hi_count,
    hi_mass,
    hint,
    target,
    BY_MASS: tl.constexpr,
    SHIFT: tl.constexpr,
    CAPACITY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The largest key t in [lo, hi) such that the logits from t on have ``target`` in number or mass; with both of
    these. ``lo_count`` (or more than there are) and ``lo_mass`` are those from ``lo`` on, and enough; ``hi_count`` and
    ``hi_mass`` those from ``hi`` on, and not enough; ``hint`` is a guess."""
    # First the guess; the largest logit alone; and a value between, or all but -inf, of which rows may be full.
    a = tl.minimum(tl.maximum(hint, lo), hi - 1)
    b = hi - 1
    if BY_MASS:
        third = (value(hi - 1, SHIFT) - value(a, SHIFT)) / 3
        c = key_of(value(a, SHIFT) + third, SHIFT)
        if hi_count > 0:
            b = key_of(value(a, SHIFT) + 2 * third, SHIFT)
    else:
        c = lo + 1
    while (hi - lo > 1) & (lo_count - hi_count > CAPACITY):
        count_a, count_b, count_c, mass_a, mass_b, mass_c = _tally(
            row_ptr, peak, scale, vocab, value(a, SHIFT), value(b, SHIFT), value(c, SHIFT), LANES, WIDTH
        )
        if BY_MASS:
            enough_a, enough_b, enough_c = mass_a >= target, mass_b >= target, mass_c >= target
        else:
            enough_a, enough_b, enough_c = count_a >= target, count_b >= target, count_c >= target
        lo, lo_count, lo_mass, hi, hi_count, hi_mass = _narrow(
            lo, lo_count, lo_mass, hi, hi_count, hi_mass, a, count_a, mass_a, enough_a
        )
        lo, lo_count, lo_mass, hi, hi_count, hi_mass = _narrow(
            lo, lo_count, lo_mass, hi, hi_count, hi_mass, b, count_b, mass_b, enough_b
        )
        lo, lo_count, lo_mass, hi, hi_count, hi_mass = _narrow(
            lo, lo_count, lo_mass, hi, hi_count, hi_mass, c, count_c, mass_c, enough_c
        )
        # Two pivots by value find the place fast; one by key halves what is left, whatever the values are.
        low = tl.maximum(value(lo, SHIFT), peak - _SPAN)
        third = (value(hi - 1, SHIFT) - low) / 3
        a = tl.minimum(tl.maximum(key_of(low + third, SHIFT), lo), hi - 1)
        b = tl.minimum(tl.maximum(key_of(low + 2 * third, SHIFT), lo), hi - 1)
        c = (lo + hi) >> 1
    if hi - lo > 1:
        found = _gather(row_ptr, candidates_ptr, vocab, value(lo, SHIFT), value(hi, SHIFT), LANES, WIDTH)
        tl.debug_barrier()  # what other threads of this program wrote is read
        place = tl.arange(0, CAPACITY)
        x = clean(tl.load(candidates_ptr + place, mask=place < found, other=float("-inf")))
        ones = (place < found).to(tl.int32)
        mass = tl.where(place < found, weight(x, peak, scale), 0.0)
        if BY_MASS:
            lo = bisect(x, mass, lo, hi, target - hi_mass, SHIFT)
        else:
            lo = bisect(x, ones, lo, hi, target - hi_count, SHIFT)
        kept = x >= value(lo, SHIFT)
        lo_count = hi_count + tl.sum(tl.where(kept, ones, 0))
        lo_mass = hi_mass + tl.sum(tl.where(kept, mass, 0.0))
        tl.debug_barrier()  # the next search writes there
    return lo, lo_count, lo_mass
