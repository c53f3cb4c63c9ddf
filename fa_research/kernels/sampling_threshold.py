"""Top-k, top-p and min-p as one number: the smallest logit of a row that may be drawn. One program a row.

What is kept has the largest threshold t such that the logits from t on are at least k (top-k), or have at least a
share p of the mass of those that top-k left (top-p). Both are one search: t lies between two bounds, each pass over the
row counts and weighs what lies above three pivots, until so few logits are left between that they can be looked at
alone. FlashInfer's samplers search likewise, with pivots that they draw.

Bounds are kept as integer keys, which have the order of the floats and no gaps, so that the search ends and is exact.
Mass is summed in float32, in a fixed order: a t whose mass is within 1e-5 of the share may fall on either side.
"""

from __future__ import annotations

import triton
import triton.language as tl

CAPACITY = 8192  # logits that are looked at alone
HIGHEST = tl.constexpr(3.4028234663852886e38)  # largest finite float32
_LOWEST_KEY = tl.constexpr(-(2**31) + 0x7FFFFF)  # of -inf
_SPAN = tl.constexpr(128.0)  # below the largest logit: pivots by value begin here at the lowest


@triton.jit
def order(x):
    """int32 keys in the order of float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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
def _bisect(x, weights, lo, hi, target):
    """The largest key in [lo, hi) from which on x weighs at least ``target``; lo if none."""
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        if tl.sum(tl.where(x >= _value(middle), weights, 0.0)) >= target:
            lo = middle
        else:
            hi = middle
    return lo


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
    for start in range(0, vocab, LANES * WIDTH):
        ids = start + tl.arange(0, LANES * WIDTH)
        # Not cleaned: a NaN is above no pivot, and infinite mass is enough.
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        x = tl.reshape(x, [LANES, WIDTH])
        mass = weight(x, peak, scale)
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
def _load(row_ptr, start, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    return clean(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))


@triton.jit
def _gather(row_ptr, candidates_ptr, vocab, low, high, BLOCK: tl.constexpr):
    """The finite logits from ``low`` to below ``high``, written one after the other; how many."""
    filled = 0
    x = _load(row_ptr, 0, vocab, BLOCK)
    for start in range(0, vocab, BLOCK):
        # On its way while the threads wait for one another.
        following = _load(row_ptr, start + BLOCK, vocab, BLOCK)
        # Not "x < high": above an infinite logit lies a NaN.
        inside = ((x >= low) & ((x >= high) == 0) & (x > float("-inf"))).to(tl.int32)
        found = tl.sum(inside)
        if found > 0:
            tl.store(candidates_ptr + filled + tl.cumsum(inside) - 1, x, mask=inside != 0)
        filled += found
        x = following
    return filled


@triton.jit
def _search(
    row_ptr,
    candidates_ptr,
    peak,
    scale,
    vocab,
    lo,
    lo_count,
    lo_mass,
    hint,
    target,
    BY_MASS: tl.constexpr,
    CAPACITY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The largest key t >= lo such that the logits from t on have ``target`` in number or mass; with both of these.
    ``lo_count`` (or more than there are) and ``lo_mass`` are those from ``lo`` on, and enough; ``hint`` is a guess."""
    hi = order(peak).to(tl.int64) + 1
    hi_count = 0
    hi_mass = 0.0
    # First the guess; the largest logit alone; and a value between, or all but -inf, of which rows may be full.
    a = tl.minimum(tl.maximum(hint.to(tl.int64), lo), hi - 1)
    b = hi - 1
    if BY_MASS:
        c = order(_value(a) + (peak - _value(a)) / 3).to(tl.int64)
    else:
        c = lo + 1
    while (hi - lo > 1) & (lo_count - hi_count > CAPACITY):
        count_a, count_b, count_c, mass_a, mass_b, mass_c = _tally(
            row_ptr, peak, scale, vocab, _value(a), _value(b), _value(c), LANES, WIDTH
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
        low = tl.maximum(_value(lo), peak - _SPAN)
        third = (_value(hi - 1) - low) / 3
        a = tl.minimum(tl.maximum(order(low + third).to(tl.int64), lo), hi - 1)
        b = tl.minimum(tl.maximum(order(low + 2 * third).to(tl.int64), lo), hi - 1)
        c = (lo + hi) >> 1
    if hi - lo > 1:
        found = _gather(row_ptr, candidates_ptr, vocab, _value(lo), _value(hi), LANES * WIDTH)
        tl.debug_barrier()  # what other threads of this program wrote is read
        place = tl.arange(0, CAPACITY)
        x = tl.load(candidates_ptr + place, mask=place < found, other=float("-inf"))
        ones = (place < found).to(tl.float32)
        mass = tl.where(place < found, weight(x, peak, scale), 0.0)
        if BY_MASS:
            lo = _bisect(x, mass, lo, hi, target - hi_mass)
        else:
            lo = _bisect(x, ones, lo, hi, (target - hi_count).to(tl.float32))
        kept = x >= _value(lo)
        lo_count = hi_count + tl.sum(tl.where(kept, ones, 0.0)).to(tl.int32)
        lo_mass = hi_mass + tl.sum(tl.where(kept, mass, 0.0))
        tl.debug_barrier()  # the next search writes there
    return lo, lo_count, lo_mass


@triton.jit(do_not_specialize=["num_splits", "num_groups"])
def threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    group_peaks_ptr,
    split_peaks_ptr,
    split_masses_ptr,
    candidates_ptr,
    peak_ptr,
    threshold_ptr,
    vocab,
    logits_stride_b,
    num_groups,
    num_splits,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        scale = scale_of(temperature)
        split = tl.arange(0, SPLITS)
        part = row * num_splits + split
        peaks = tl.load(split_peaks_ptr + part, mask=split < num_splits, other=-HIGHEST)
        peak = tl.max(peaks)
        masses = tl.load(split_masses_ptr + part, mask=split < num_splits, other=0.0)
        mass = tl.sum(masses * weight(peaks, peak, scale))
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        row_ptr = logits_ptr + row * logits_stride_b
        candidates_ptr += row * CAPACITY
        lo = tl.full([], _LOWEST_KEY, tl.int64)
        count = tl.full([], 0, tl.int32) + vocab  # a number also where the vocabulary is 1
        if mass > 0:
            if (top_k > 0) & (top_k < vocab):
                # k groups have a logit at or above the k-th largest of their peaks, so t is no lower.
                group = tl.arange(0, GROUPS)
                seen = group < num_groups
                groups = tl.load(group_peaks_ptr + row * num_groups + group, mask=seen, other=float("-inf"))
                top = order(peak).to(tl.int64) + 1
                hint = _bisect(groups, seen.to(tl.float32), lo, top, top_k.to(tl.float32))
                lo, count, mass = _search(
                    row_ptr, candidates_ptr, peak, scale, vocab, lo, count, mass, hint, top_k,
                    False, CAPACITY, LANES, WIDTH,
                )  # fmt: skip
            if top_p < 1:
                # Logits this low have, all together, less than a share 1 - p.
                low = peak + tl.log2(mass * (1 - top_p) / count) / scale
                target = tl.maximum(top_p * mass, 1e-30)
                lo, count, mass = _search(
                    row_ptr, candidates_ptr, peak, scale, vocab, lo, count, mass, order(low), target,
                    True, CAPACITY, LANES, WIDTH,
                )  # fmt: skip
        threshold = tl.maximum(_value(lo), -HIGHEST)
        if min_p > 0:
            threshold = tl.maximum(threshold, peak + tl.log(min_p) * temperature)
        tl.store(peak_ptr + row, peak)
        tl.store(threshold_ptr + row, threshold)
