"""The draw of a token from each row, in two launches: the winner of each part of the row, and the winner of the parts.

sampling.py tells what the numbers mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fa_research.kernels.sampling_keys import clean, order, scale_of

LANES = 1024  # ids whose noise is the same word of their Philox blocks: sampling_torch.py repeats it
TILE = tl.constexpr(4 * LANES)
_NOBODY = tl.constexpr(-(2**31))  # below the key of every logit
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _greedy(row_ptr, vocab, first_tile, last_tile):
    """Key and id of the largest logit, the first of equal ones; NaN counts as the largest (torch.argmax's rules)."""
    best = tl.full([TILE], _NOBODY, tl.int32)
    best_id = tl.zeros([TILE], tl.int32)
    for tile in range(first_tile, last_tile):
        ids = tile * TILE + tl.arange(0, TILE)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        key = tl.where(x == x, order(tl.where(x == 0.0, 0.0, x)), _LAST)
        better = key > best
        best = tl.where(better, key, best)
        best_id = tl.where(better, ids, best_id)
    key = tl.max(best)
    return key, tl.min(tl.where(best == key, best_id, _LAST))


@triton.jit
def _exponential(word):
    """A standard exponential number from 32 random bits: -log(1 - v) of a uniform v. The smallest decide the race, and
    keep their digits, as v is small there."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    return tl.where(v < 0.0625, series, -tl.log(1.0 - v))


@triton.jit
def _race(best, best_id, x, word, ids, peak, scale, threshold):
    """The first to arrive: an exponential number over the weight."""
    arrival = _exponential(word) * tl.exp2((peak - x) * scale)
    better = (x >= threshold) & (arrival < best)
    return tl.where(better, arrival, best), tl.where(better, ids, best_id)


@triton.jit
def _sampled(
    row_ptr, vocab, first_tile, last_tile, temperature, seed, position, peak, threshold, LANES: tl.constexpr
):
    """Key and id of the winner among logits from the threshold on; id 0 where there is none."""
    best = tl.full([LANES], float("inf"), tl.float32)
    best_id = tl.zeros([LANES], tl.int32)
    scale = scale_of(temperature)
    for tile in range(first_tile, last_tile):
        ids = tile * TILE + tl.arange(0, LANES)
        row_at = row_ptr + ids
        x0 = clean(tl.load(row_at, mask=ids < vocab, other=float("-inf")))
        x1 = clean(tl.load(row_at + LANES, mask=ids + LANES < vocab, other=float("-inf")))
        x2 = clean(tl.load(row_at + 2 * LANES, mask=ids + 2 * LANES < vocab, other=float("-inf")))
        x3 = clean(tl.load(row_at + 3 * LANES, mask=ids + 3 * LANES < vocab, other=float("-inf")))
        if tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))) >= threshold:
            block = tile * LANES + tl.arange(0, LANES)
            zero = block * 0
            w0, w1, w2, w3 = tl.philox(seed, block, zero, zero + position, zero)
            best, best_id = _race(best, best_id, x0, w0, ids, peak, scale, threshold)
            best, best_id = _race(best, best_id, x1, w1, ids + LANES, peak, scale, threshold)
            best, best_id = _race(best, best_id, x2, w2, ids + 2 * LANES, peak, scale, threshold)
            best, best_id = _race(best, best_id, x3, w3, ids + 3 * LANES, peak, scale, threshold)
    arrival = tl.min(best)
    return order(-arrival), tl.min(tl.where(best == arrival, best_id, _LAST))


@triton.jit(do_not_specialize=["tiles_per_split"])
def draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    positions_ptr,
    peak_ptr,
    threshold_ptr,
    part_keys_ptr,
    part_ids_ptr,
    vocab,
    logits_stride_b,
    tiles_per_split,
    LANES: tl.constexpr,
):
    """Without ``temperature_ptr`` every row is greedy."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + row * logits_stride_b
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, TILE))
    if temperature_ptr is None:
        key, best_id = _greedy(row_ptr, vocab, first, last)
    else:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            seed, position = tl.load(seed_ptr + row), tl.load(positions_ptr + row).to(tl.int32)
            peak, threshold = tl.load(peak_ptr + row), tl.load(threshold_ptr + row)
            key, best_id = _sampled(
                row_ptr, vocab, first, last, temperature, seed, position, peak, threshold, LANES
            )
        else:
            key, best_id = _greedy(row_ptr, vocab, first, last)
    tl.store(part_keys_ptr + row * tl.num_programs(1) + split, key)
    tl.store(part_ids_ptr + row * tl.num_programs(1) + split, best_id)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(part_keys_ptr, part_ids_ptr, out_ptr, num_splits, SPLITS: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    part = row * num_splits + split
    keys = tl.load(part_keys_ptr + part, mask=split < num_splits, other=_NOBODY)
    ids = tl.load(part_ids_ptr + part, mask=split < num_splits, other=_LAST)
    best_id = tl.min(tl.where(keys == tl.max(keys), ids, _LAST))
    tl.store(out_ptr + row, best_id.to(tl.int64))
