"""Sampling on the device: greedy tokens, and draws by the Gumbel-max trick, in a fixed number of launches.

Shapes: B requests, X vocabulary, S programs that share a request's row. A row is read from L2, where the model's head
has just left it; each launch looks at it once more:

    summary     largest logit of each group of ids, and the probability mass       (sampled requests)
    threshold   top-k, top-p and min-p as one number for each request              (sampling_threshold.py)
    draw        winner of each part of the row
    combine     winner of the parts

The largest of ``logit / temperature + noise`` is a draw from the softmax if the noise is Gumbel's and independent for
each id (Maddison et al., "A* Sampling", 2014), so the parts need not know of one another. Gumbel's noise is
``-log(E)``, E exponential; the kernel finds the smallest of ``E / exp(logit / temperature)``, a logarithm less.
The noise is counter-based (Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a
function of seed, position and id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fa_research.kernels.common import multiprocessors
from fa_research.kernels.sampling_threshold import (
    CAPACITY,
    HIGHEST,
    clean,
    order,
    scale_of,
    threshold_kernel,
    weight,
)

LANES = 1024  # ids whose noise is the same word of their Philox blocks: sampling_torch.py repeats it
TILE = tl.constexpr(4 * LANES)
_GROUP = 32  # ids, at least
_MAX_GROUPS = 8192  # of a row
_PROGRAMS = 8  # a multiprocessor
_NOBODY = tl.constexpr(-(2**31))  # below the key of every logit
_LAST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["tiles_per_split", "num_groups"])
def _summary_kernel(
    logits_ptr,
    temperature_ptr,
    group_peaks_ptr,
    split_peaks_ptr,
    split_masses_ptr,
    vocab,
    logits_stride_b,
    num_groups,
    tiles_per_split,
    GROUP: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        scale = scale_of(temperature)
        peak = -HIGHEST
        mass = 0.0
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(vocab, TILE))):
            ids = tile * TILE + tl.arange(0, TILE)
            x = clean(
                tl.load(logits_ptr + row * logits_stride_b + ids, mask=ids < vocab, other=float("-inf"))
            )
            groups = tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), axis=1)
            group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
            tl.store(group_peaks_ptr + row * num_groups + group, groups)
            new_peak = tl.maximum(peak, tl.max(groups))
            mass = mass * weight(peak, new_peak, scale) + tl.sum(weight(x, new_peak, scale))
            peak = new_peak
        tl.store(split_peaks_ptr + row * tl.num_programs(1) + split, peak)
        tl.store(split_masses_ptr + row * tl.num_programs(1) + split, mass)


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
def _draw_kernel(
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
def _combine_kernel(part_keys_ptr, part_ids_ptr, out_ptr, num_splits, SPLITS: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    part = row * num_splits + split
    keys = tl.load(part_keys_ptr + part, mask=split < num_splits, other=_NOBODY)
    ids = tl.load(part_ids_ptr + part, mask=split < num_splits, other=_LAST)
    best_id = tl.min(tl.where(keys == tl.max(keys), ids, _LAST))
    tl.store(out_ptr + row, best_id.to(tl.int64))


def _split(logits_BX: Tensor) -> tuple[int, int]:
    """(programs that share a row, tiles of each): enough programs for the device, each with at least one tile."""
    tiles = triton.cdiv(logits_BX.shape[1], TILE.value)
    wanted = max(1, _PROGRAMS * multiprocessors(logits_BX.device) // logits_BX.shape[0])
    tiles_per_split = triton.cdiv(tiles, min(tiles, wanted))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _best(
    logits_BX: Tensor,
    out_B: Tensor,
    temperature_B: Tensor | None,
    seed_B: Tensor | None,
    positions_B: Tensor | None,
    peak_B: Tensor | None,
    threshold_B: Tensor | None,
) -> None:
    """The draw and its combination, two launches."""
    size, vocab = logits_BX.shape
    splits, tiles_per_split = _split(logits_BX)
    keys, ids = (_empty(logits_BX, size, splits, dtype=torch.int32) for _ in range(2))
    _draw_kernel[(size, splits)](
        logits_BX, temperature_B, seed_B, positions_B, peak_B, threshold_B, keys, ids,
        vocab, logits_BX.stride(0), tiles_per_split, LANES, num_warps=8,
    )  # fmt: skip
    tiles = triton.cdiv(vocab, TILE.value)
    _combine_kernel[(size,)](keys, ids, out_B, splits, triton.next_power_of_2(tiles), num_warps=1)


def argmax(logits_BX: Tensor, out: Tensor | None = None) -> Tensor:
    """Index of each row's largest logit, int64 [B], by the rules of torch.argmax on a GPU: the first of equal ones, and
    NaN above everything. ``logits_BX`` has a contiguous last dimension."""
    assert logits_BX.stride(1) == 1 and logits_BX.numel() > 0
    out_B = _empty(logits_BX, logits_BX.shape[0], dtype=torch.int64) if out is None else out
    assert out_B.shape == logits_BX.shape[:1] and out_B.dtype == torch.int64
    _best(logits_BX, out_B, None, None, None, None, None)
    return out_B


def thresholds(
    logits_BX: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    capacity: int = CAPACITY,
) -> tuple[Tensor, Tensor]:
    """(largest logit, smallest logit that may be drawn) of each sampled row, float32 [B]; two launches. NaN is taken
    as -inf and +inf as the largest float32; a row without a finite logit has a threshold that none reaches. Entries of
    greedy rows stay unwritten."""
    size, vocab = logits_BX.shape
    splits, tiles_per_split = _split(logits_BX)
    tiles = triton.cdiv(vocab, TILE.value)
    group = max(_GROUP, TILE.value * triton.next_power_of_2(tiles) // _MAX_GROUPS)
    num_groups = tiles * (TILE.value // group)
    group_peaks, split_peaks = _empty(logits_BX, size, num_groups), _empty(logits_BX, size, splits)
    split_masses, candidates = torch.empty_like(split_peaks), _empty(logits_BX, size, capacity)
    peak_B, threshold_B = _empty(logits_BX, 2, size)
    _summary_kernel[(size, splits)](
        logits_BX, temperature_B, group_peaks, split_peaks, split_masses,
        vocab, logits_BX.stride(0), num_groups, tiles_per_split, group, num_warps=8,
    )  # fmt: skip
    threshold_kernel[(size,)](
        logits_BX, temperature_B, top_k_B, top_p_B, min_p_B, group_peaks, split_peaks, split_masses, candidates,
        peak_B, threshold_B, vocab, logits_BX.stride(0), num_groups, splits,
        triton.next_power_of_2(num_groups), triton.next_power_of_2(tiles), capacity,
        512, 16 // logits_BX.element_size(), num_warps=16,
    )  # fmt: skip
    return peak_B, threshold_B


def sample(
    logits_BX: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    positions_B: Tensor,
    out_B: Tensor,
    capacity: int = CAPACITY,
) -> None:
    """One token for each row into ``out_B`` (int64 [B]); ops.sample says what the parameters do. Four launches, no
    matter what they hold; rows with temperature 0 cost an argmax."""
    assert logits_BX.stride(1) == 1 and logits_BX.numel() > 0
    peak_B, threshold_B = thresholds(logits_BX, temperature_B, top_k_B, top_p_B, min_p_B, capacity)
    _best(logits_BX, out_B, temperature_B, seed_B, positions_B, peak_B, threshold_B)
