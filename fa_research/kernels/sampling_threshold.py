"""Top-k, top-p and min-p as one number: the smallest logit of a row that may be drawn. One program a row.

What is kept has the largest threshold t such that the logits from t on are at least k (top-k), or have at least a
share p of the mass of those that top-k left (top-p).

The k-th largest peak of the row's groups of ids is no higher than the k-th largest logit, so only the groups with such
a peak have logits that top-k keeps: the leading groups. Their logits are read once, as many as fit in registers, and
bisections over these find t for top-k and then top-p. Without top-k, as many groups lead as fit; they decide top-p if
they have its mass. Otherwise, and where too many groups lead (a large k, ties), the row is searched
(sampling_search.py).

Keys (sampling_keys.py) have no gaps, so that the searches end and are exact. Mass is summed in float32, in a fixed
order: a t whose mass is within 1e-5 of the share may fall on either side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fa_research.kernels.sampling_keys import HIGHEST, bisect, clean, key_of, scale_of, value, weight
from fa_research.kernels.sampling_search import search

CAPACITY = 8192  # logits that are looked at alone
_FEW = tl.constexpr(2048)  # that are looked at by fewer instructions
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _target(top_p, mass):
    return tl.maximum(top_p * mass, 1e-30)


@triton.jit
def _leading(group_peaks_ptr, leaders_ptr, peak, num_groups, top_k, GROUPS: tl.constexpr, SHIFT: tl.constexpr,
             LEADERS: tl.constexpr):  # fmt: skip
    """Writes which groups lead, if they are no more than LEADERS; the key that is no higher than their peaks, their
    number, and whether no other group has a finite logit. Without top-k (0) there are as many as LEADERS allows."""
    group = tl.arange(0, GROUPS)
    peaks = tl.load(group_peaks_ptr + group, mask=group < num_groups, other=_LOWEST)
    finite = (peaks > _LOWEST).to(tl.int32)
    bottom = key_of(tl.min(tl.where(finite != 0, peaks, peak)), SHIFT)
    top = key_of(peak, SHIFT) + 1
    h = bisect(peaks, finite, bottom, top, tl.where(top_k > 0, top_k, LEADERS), SHIFT)
    number = tl.sum(tl.where(peaks >= value(h, SHIFT), finite, 0))
    if (top_k == 0) & (number > LEADERS):
        h += 1
        number = tl.sum(tl.where(peaks >= value(h, SHIFT), finite, 0))
    if number <= LEADERS:
        leads = tl.where(peaks >= value(h, SHIFT), finite, 0)
        tl.store(leaders_ptr + tl.cumsum(leads) - 1, group, mask=leads != 0)
        tl.debug_barrier()  # other threads of this program read it
    return h, number, h == bottom


@triton.jit
def _among_leaders(row_ptr, leaders_ptr, peak, scale, vocab, mass, number, lo, top_k, top_p, GROUP: tl.constexpr,
                   SHIFT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """The threshold among the logits of the leading groups, with the number and mass of logits from there on, and
    whether it is the row's. All logits from the key ``lo`` on are among them, and top_k (unless 0) from ``lo`` on."""
    place = tl.arange(0, SIZE)
    led = place // GROUP < number
    ids = tl.load(leaders_ptr + place // GROUP, mask=led, other=0) * GROUP + place % GROUP
    x = clean(tl.load(row_ptr + ids, mask=led & (ids < vocab), other=_LOWEST))
    weights = weight(x, peak, scale)  # of -inf: 0
    top = key_of(peak, SHIFT) + 1
    if top_k > 0:
        lo = bisect(x, (x > _LOWEST).to(tl.int32), lo, top, top_k, SHIFT)
    count = tl.sum((x >= value(lo, SHIFT)).to(tl.int32))
    above = tl.sum(tl.where(x >= value(lo, SHIFT), weights, 0.0))
    target = _target(top_p, tl.where(top_k > 0, above, mass))
    solved = (top_k > 0) | (above >= target)
    if (top_p < 1) & solved:
        lo = bisect(x, weights, lo, top, target, SHIFT)
    return lo, count, above, solved.to(tl.int32)


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
    leaders_ptr,
    candidates_ptr,
    peak_ptr,
    threshold_ptr,
    vocab,
    logits_stride_b,
    num_groups,
    num_splits,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHIFT: tl.constexpr,
    CAPACITY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    LEADERS: tl.constexpr = CAPACITY // GROUP
    FEW: tl.constexpr = min(_FEW, CAPACITY)
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
        top_k = tl.where(top_k < vocab, tl.maximum(top_k, 0), 0)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        row_ptr = logits_ptr + row * logits_stride_b
        candidates_ptr += row * CAPACITY
        leaders_ptr += row * LEADERS
        lowest = key_of(tl.full([], _LOWEST, tl.float32), SHIFT)
        top = key_of(peak, SHIFT) + 1
        lo = lowest
        if (mass > 0) & ((top_k > 0) | (top_p < 1)):
            hint, number, everything = _leading(
                group_peaks_ptr + row * num_groups,
                leaders_ptr,
                peak,
                num_groups,
                top_k,
                GROUPS,
                SHIFT,
                LEADERS,
            )
            bound = tl.where(everything, lowest, hint)
            solved = tl.full([], 0, tl.int32)
            hi, hi_count, hi_mass = top, tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
            if number <= FEW // GROUP:
                hi, hi_count, hi_mass, solved = _among_leaders(
                    row_ptr,
                    leaders_ptr,
                    peak,
                    scale,
                    vocab,
                    mass,
                    number,
                    bound,
                    top_k,
                    top_p,
                    GROUP,
                    SHIFT,
                    FEW,
                )
            elif number <= LEADERS:
                hi, hi_count, hi_mass, solved = _among_leaders(
                    row_ptr,
                    leaders_ptr,
                    peak,
                    scale,
                    vocab,
                    mass,
                    number,
                    bound,
                    top_k,
                    top_p,
                    GROUP,
                    SHIFT,
                    CAPACITY,
                )
            if solved != 0:
                lo = hi
            else:
                count = tl.full([], 0, tl.int32) + vocab
                if top_k > 0:
                    lo, count, mass = search(
                        row_ptr, candidates_ptr, peak, scale, vocab, lo, count, mass, hi, hi_count, hi_mass,
                        hint, top_k, False, SHIFT, CAPACITY, LANES, WIDTH,
                    )  # fmt: skip
                if top_p < 1:
                    # Logits this low have, all together, less than a share 1 - p.
                    low = peak + tl.log2(mass * (1 - top_p) / count) / scale
                    lo, count, mass = search(
                        row_ptr, candidates_ptr, peak, scale, vocab, lo, count, mass, hi, hi_count, hi_mass,
                        key_of(low, SHIFT), _target(top_p, mass), True, SHIFT, CAPACITY, LANES, WIDTH,
                    )  # fmt: skip
        # The largest logit may be an infinite one, of a key with the largest finite one of its type.
        threshold = tl.where(lo == top - 1, peak, tl.maximum(value(lo, SHIFT), -HIGHEST))
        if min_p > 0:
            threshold = tl.maximum(threshold, peak + tl.log(min_p) * temperature)
        tl.store(peak_ptr + row, peak)
        tl.store(threshold_ptr + row, threshold)
