"""Sampling on the device: greedy tokens, and draws by the Gumbel-max trick, in a fixed number of launches.

Shapes: B requests, X vocabulary, S programs that share a request's row. A row is read from L2, where the model's head
has just left it; each launch looks at it once more:

    summary     largest logit of each group of ids, and the probability mass       (sampled requests)
    threshold   top-k, top-p and min-p as one number for each request              (sampling_threshold.py)
    draw        winner of each part of the row                                     (sampling_draw.py)
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
from fa_research.kernels.sampling_draw import LANES, TILE, combine_kernel, draw_kernel
from fa_research.kernels.sampling_keys import HIGHEST, SHIFTS, clean, scale_of, weight
from fa_research.kernels.sampling_threshold import CAPACITY, threshold_kernel

_GROUP = 32  # ids, at least
_MAX_GROUPS = 8192  # of a row
_PROGRAMS = 8  # a multiprocessor


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
    draw_kernel[(size, splits)](
        logits_BX, temperature_B, seed_B, positions_B, peak_B, threshold_B, keys, ids,
        vocab, logits_BX.stride(0), tiles_per_split, LANES, num_warps=8,
    )  # fmt: skip
    tiles = triton.cdiv(vocab, TILE.value)
    combine_kernel[(size,)](keys, ids, out_B, splits, triton.next_power_of_2(tiles), num_warps=1)


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
    leaders = _empty(logits_BX, size, max(1, capacity // group), dtype=torch.int32)
    peak_B, threshold_B = _empty(logits_BX, 2, size)
    _summary_kernel[(size, splits)](
        logits_BX, temperature_B, group_peaks, split_peaks, split_masses,
        vocab, logits_BX.stride(0), num_groups, tiles_per_split, group, num_warps=8,
    )  # fmt: skip
    threshold_kernel[(size,)](
        logits_BX, temperature_B, top_k_B, top_p_B, min_p_B, group_peaks, split_peaks, split_masses, leaders,
        candidates, peak_B, threshold_B, vocab, logits_BX.stride(0), num_groups, splits,
        group, triton.next_power_of_2(num_groups), triton.next_power_of_2(tiles), SHIFTS[logits_BX.dtype], capacity,
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
