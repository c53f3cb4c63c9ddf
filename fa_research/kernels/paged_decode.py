"""Decode attention: one new token a request over a paged KV cache, split along the keys and combined.

Shape suffixes: B requests, H query heads, K KV heads, D head dim, V value head dim (= D), N slots, P pages of
a request.

Flash-decoding (Dao et al. 2023) with GQA packing: the query heads of one KV head are the rows of one matrix
product, so K and V are read once. The work is cut the way of stream-K (Osama et al. 2023): every tile of
every (request, KV head) pair stands in one long list, and a fixed number of workers, a few per
multiprocessor, takes equal contiguous pieces of it. A worker reads `cache_seqlens` and finds its piece by
itself, so the grid depends on nothing that changes from step to step: it is right under a CUDA graph captured
for any length, no program idles because a request is short, and ragged batches are balanced. A pair that lies
within one worker's piece is written at once; the others leave partial results which the second kernel merges
by their log-sum-exp.

With `deterministic` (or `num_splits`) the pieces are cut per request instead, from its own length alone, so
its result does not depend on its neighbours, bit for bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from fa_research.kernels.common import (
    LN2,
    LOWEST,
    block_dim,
    first_allowed,
    head_mask,
    load_pages,
    load_tile,
    multiprocessors,
    online_softmax,
    overlaps_launches,
    sink_factor,
)

# Deterministic cuts: splits of so many keys, or so many splits of a request that is longer than all of them.
DETERMINISTIC_KEYS = 512
DETERMINISTIC_SPLITS = 32
# The interpreter's time goes by tiles, not by keys: from this length on it takes large ones.
INTERPRETER_KEYS = 256


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernels are launched: keys a tile, warps, pipeline stages, workers a multiprocessor."""

    block_n: int
    num_warps: int
    num_stages: int
    workers_per_sm: int
    min_tiles: int  # a worker takes at least so many tiles, or merging costs more than it saves
    overlap: bool = True  # start the combine kernel early, where the device can


@functools.cache
def decode_config(head_dim: int, group: int, itemsize: int, page_size: int) -> DecodeConfig:
    """Launch configuration by shape. Nothing of the batch may enter: `deterministic` depends on the tile."""
    if itemsize == 4:
        return DecodeConfig(block_n=32, num_warps=8, num_stages=2, workers_per_sm=1, min_tiles=4)
    if head_dim <= 64:
        return DecodeConfig(block_n=128, num_warps=4, num_stages=3, workers_per_sm=2, min_tiles=2)
    if head_dim <= 128:
        return DecodeConfig(block_n=128, num_warps=4, num_stages=2, workers_per_sm=2, min_tiles=2)
    return DecodeConfig(block_n=32, num_warps=4, num_stages=3, workers_per_sm=2, min_tiles=4)


# fmt: off
@triton.jit
def _tiles(seqlen, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First tile and number of tiles that the last token of a request of `seqlen` looks at.

    An empty request counts as one (wholly masked) tile, so that somebody writes its zeros.
    """
    lowest = first_allowed(seqlen - 1, WINDOW, CHUNK) // BLOCK_N
    return lowest, tl.maximum(tl.cdiv(seqlen, BLOCK_N) - lowest, 1)


@triton.jit
def _units(tiles, MAX_SPLITS: tl.constexpr, MIN_TILES: tl.constexpr):
    """Units of work in a pair of so many tiles, and tiles a unit: one (stream-K), or those of a fixed split."""
    if MAX_SPLITS > 0:
        unit_tiles = tl.maximum(tl.cdiv(tiles, MAX_SPLITS), MIN_TILES)
        return tl.cdiv(tiles, unit_tiles), unit_tiles
    else:
        return tiles, 1


@triton.jit(do_not_specialize=["batch"])
def _decode_kernel(q_ptr, k_ptr, v_ptr, table_ptr, seqlens_ptr, sinks_ptr, out_ptr, lse_ptr, partial_ptr,
                   partial_lse_ptr, scale, softcap, batch,
                   stride_qb, stride_qh, stride_kh, stride_vh, stride_ob, stride_oh, stride_tb,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
                   MAX_SPLITS: tl.constexpr, MIN_TILES: tl.constexpr, HEAD_DIM: tl.constexpr,
                   BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, STRIDE_KN: tl.constexpr,
                   STRIDE_VN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
                   HAS_SOFTCAP: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # the combine kernel may come up beside us; it waits for our end
    worker = tl.program_id(0)
    requests = tl.arange(0, BLOCK_B)
    lens = tl.load(seqlens_ptr + requests, mask=requests < batch, other=0)
    _, all_tiles = _tiles(lens, BLOCK_N, WINDOW, CHUNK)
    all_units, _ = _units(all_tiles, MAX_SPLITS, MIN_TILES)
    all_units = tl.where(requests < batch, all_units * KV_HEADS, 0)
    ends = tl.cumsum(all_units, 0)
    total = tl.sum(all_units, 0)
    share = tl.cdiv(total, tl.num_programs(0))
    if MAX_SPLITS == 0:
        share = tl.maximum(share, MIN_TILES)
    unit = worker * share
    last_unit = tl.minimum(unit + share, total)

    rows = tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    keys = tl.arange(0, BLOCK_N)
    in_group = rows < GROUP
    in_head = head_mask(in_group, HEAD_DIM, BLOCK_D)
    while unit < last_unit:
        # Which pair, and which of its tiles.
        request = tl.sum((ends <= unit).to(tl.int32), 0)
        seqlen = tl.load(seqlens_ptr + request)
        first = first_allowed(seqlen - 1, WINDOW, CHUNK)
        lowest, tiles = _tiles(seqlen, BLOCK_N, WINDOW, CHUNK)
        units, unit_tiles = _units(tiles, MAX_SPLITS, MIN_TILES)
        within = unit - tl.sum(tl.where(ends <= unit, all_units, 0), 0)
        head = within // units
        piece = within % units
        if MAX_SPLITS > 0:
            taken = 1
            slot = (request * KV_HEADS + head) * MAX_SPLITS + piece
        else:
            # Two partial results a worker: of the pair that it goes on with, and of the pair that it begins.
            taken = tl.minimum(units - piece, last_unit - unit)
            slot = worker * 2 + (piece == 0).to(tl.int32)
        low = (lowest + piece * unit_tiles) * BLOCK_N
        high = tl.minimum(low + taken * unit_tiles * BLOCK_N, seqlen)

        q_heads = head * GROUP + rows
        q_rows = q_ptr + request.to(tl.int64) * stride_qb + q_heads * stride_qh
        q = tl.load(q_rows[:, None] + cols[None, :], mask=in_head, other=0.0)
        k_head = k_ptr + head * stride_kh
        v_head = v_ptr + head * stride_vh
        table = table_ptr + request.to(tl.int64) * stride_tb
        peak = tl.full([BLOCK_H], LOWEST, tl.float32)
        norm = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        # Page ids come one tile ahead: the loads of K and V then depend on nothing that is still under way.
        pages = load_pages(table, low, high, PAGE_SIZE, BLOCK_N, True)
        for start in tl.range(low, high, BLOCK_N):
            k = load_tile(k_head, pages, start, first, high, STRIDE_KN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            v = load_tile(v_head, pages, start, first, high, STRIDE_VN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            pages = load_pages(table, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N, True)
            live = (start + keys >= first) & (start + keys < high)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where(live[None, :], scores, float("-inf"))
            p, shrink, norm, peak = online_softmax(scores, norm, peak, scale, softcap, HAS_SOFTCAP)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

        # norm is 0 only where nothing was allowed: then out is 0 and lse -inf.
        norm = tl.where(norm > 0, norm, 1.0)
        lse2 = tl.where(peak > LOWEST, peak + tl.log2(norm), float("-inf"))
        result = acc * (1.0 / norm)[:, None]
        if taken == units:
            if sinks_ptr is not None:
                sinks = tl.load(sinks_ptr + q_heads, mask=in_group, other=0.0)
                result = result * sink_factor(sinks, lse2)[:, None]
            out_rows = out_ptr + request.to(tl.int64) * stride_ob + q_heads * stride_oh
            rounded = result.to(out_ptr.dtype.element_ty)
            tl.store(out_rows[:, None] + cols[None, :], rounded, mask=in_head)
            if lse_ptr is not None:
                tl.store(lse_ptr + request * (KV_HEADS * GROUP) + q_heads, lse2 * LN2, mask=in_group)
        else:
            parts = slot.to(tl.int64) * GROUP + rows
            tl.store(partial_ptr + (parts * HEAD_DIM)[:, None] + cols[None, :], result, mask=in_head)
            tl.store(partial_lse_ptr + parts, lse2, mask=in_group)
        unit += taken


@triton.jit(do_not_specialize=["batch", "workers"])
def _combine_kernel(seqlens_ptr, sinks_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, batch, workers,
                    stride_ob, stride_oh,
                    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                    MAX_SPLITS: tl.constexpr, MIN_TILES: tl.constexpr, HEAD_DIM: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
                    OVERLAP: tl.constexpr):
    """Merge the partial results of one (request, query head); nothing to do where one worker had it all."""
    if OVERLAP:
        # In every program: else this kernel, and so the next one's wait for it, could end before the first does.
        tl.extra.cuda.gdc_wait()
    request = tl.program_id(0) // (KV_HEADS * GROUP)
    q_head = tl.program_id(0) % (KV_HEADS * GROUP)
    head = q_head // GROUP
    # Redo the cut of the first kernel: which partial results are this pair's.
    if MAX_SPLITS > 0:
        _, tiles = _tiles(tl.load(seqlens_ptr + request), BLOCK_N, WINDOW, CHUNK)
        pieces, _ = _units(tiles, MAX_SPLITS, MIN_TILES)
        slot = (request * KV_HEADS + head) * MAX_SPLITS
    else:
        requests = tl.arange(0, BLOCK_B)
        lens = tl.load(seqlens_ptr + requests, mask=requests < batch, other=0)
        _, all_tiles = _tiles(lens, BLOCK_N, WINDOW, CHUNK)
        all_tiles = tl.where(requests < batch, all_tiles, 0)
        tiles = tl.sum(tl.where(requests == request, all_tiles, 0), 0)
        share = tl.maximum(tl.cdiv(tl.sum(all_tiles, 0) * KV_HEADS, workers), MIN_TILES)
        begin = tl.sum(tl.where(requests < request, all_tiles, 0), 0) * KV_HEADS + head * tiles
        slot = begin // share
        pieces = (begin + tiles - 1) // share - slot + 1

    if pieces > 1:
        splits = tl.arange(0, BLOCK_S)
        cols = tl.arange(0, BLOCK_D)
        peak = tl.full([], LOWEST, tl.float32)
        norm = tl.zeros([], tl.float32)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, pieces, BLOCK_S):
            live = start + splits < pieces
            slots = slot + start + splits
            if MAX_SPLITS == 0:
                slots = slots * 2 + (start + splits == 0).to(tl.int32)
            parts = slots.to(tl.int64) * GROUP + q_head % GROUP
            lse2 = tl.load(partial_lse_ptr + parts, mask=live, other=float("-inf"))
            rows = partial_ptr + parts * HEAD_DIM
            result = tl.load(rows[:, None] + cols[None, :], mask=head_mask(live, HEAD_DIM, BLOCK_D), other=0.0)
            new_peak = tl.maximum(peak, tl.max(lse2, 0))
            weights = tl.exp2(lse2 - new_peak)
            shrink = tl.exp2(peak - new_peak)
            norm = norm * shrink + tl.sum(weights, 0)
            acc = acc * shrink + tl.sum(result * weights[:, None], 0)
            peak = new_peak
        norm = tl.where(norm > 0, norm, 1.0)
        lse2 = tl.where(peak > LOWEST, peak + tl.log2(norm), float("-inf"))
        result = acc / norm
        if sinks_ptr is not None:
            result = result * sink_factor(tl.load(sinks_ptr + q_head), lse2)
        out_row = out_ptr + request.to(tl.int64) * stride_ob + q_head * stride_oh
        if BLOCK_D == HEAD_DIM:
            tl.store(out_row + cols, result.to(out_ptr.dtype.element_ty))
        else:
            tl.store(out_row + cols, result.to(out_ptr.dtype.element_ty), mask=cols < HEAD_DIM)
        if lse_ptr is not None:
            tl.store(lse_ptr + request * (KV_HEADS * GROUP) + q_head, lse2 * LN2)
# fmt: on


def _cut(config: DecodeConfig, num_splits: int, deterministic: bool) -> tuple[int, int]:
    """Most splits a request, 0 for equal shares of the whole batch, and fewest tiles a split (or a share)."""
    if num_splits > 0:
        return num_splits, 1
    if deterministic:
        return DETERMINISTIC_SPLITS, max(DETERMINISTIC_KEYS // config.block_n, 1)
    return 0, config.min_tiles


def paged_decode(
    q_BHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKV: torch.Tensor,
    page_table_BP: torch.Tensor,
    cache_seqlens_B: torch.Tensor,
    *,
    page_size: int,
    max_seq_len_k: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    sinks_H: torch.Tensor | None = None,
    num_splits: int = 0,
    deterministic: bool = False,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    _config: DecodeConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of each request's last token to its `cache_seqlens_B` keys, the token's own among them.

    Args:
        q_BHD: queries, float16, bfloat16 or float32; may be strided, the last dimension contiguous.
        k_NKD, v_NKV: pools by slot, of q's dtype; slots not in use may hold anything, NaN too.
        page_table_BP: int32 page ids; entries past a request's last page are never used.
        cache_seqlens_B: int32 lengths in tokens; 0 gives zeros and an LSE of -inf.
        page_size: slots a page. max_seq_len_k: upper bound of the lengths; the grid knows nothing else.
        scale: factor on q.k, positive. softcap: s * tanh(score / s) if above 0.
        window: only so many keys up to the token. chunk: keys from the last multiple of chunk on. 0: all.
        sinks_H: one more logit a head in the denominator.
        num_splits: pieces a request is cut into; 0 balances the batch over the GPU.
        deterministic: a request's result is the same, bit for bit, alone and in any batch.

    Returns:
        out_BHV in q's dtype, and float32 LSE_BH (natural, without the sink) if `return_lse`.
    """
    batch, heads, head_dim = q_BHD.shape
    kv_heads = k_NKD.shape[1]
    group = heads // kv_heads
    device = q_BHD.device
    assert group * kv_heads == heads and scale > 0
    assert head_dim == k_NKD.shape[2] == v_NKV.shape[2], "K and V have q's head dim"
    assert q_BHD.stride(2) == k_NKD.stride(2) == v_NKV.stride(2) == 1
    config = _config or decode_config(head_dim, group, q_BHD.element_size(), page_size)
    if _config is None and device.type == "cpu" and max_seq_len_k >= INTERPRETER_KEYS and not deterministic:
        config = replace(config, block_n=256)
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=q_BHD.dtype, device=device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=device) if return_lse else None
    if batch == 0:
        return out, lse

    max_splits, min_tiles = _cut(config, num_splits, deterministic)
    max_tiles = max(triton.cdiv(max_seq_len_k, config.block_n), 1)
    workers = multiprocessors(device) * config.workers_per_sm
    workers = min(workers, batch * kv_heads * (max_splits or max_tiles))
    # Equal shares may cut any pair of two tiles; a fixed split holds `min_tiles`.
    combine = max_splits != 1 and max_tiles > (min_tiles if max_splits else 1)
    overlap = combine and config.overlap and overlaps_launches(device)
    # One allocation: the partial results, then their log-sum-exps.
    parts = (batch * kv_heads * max_splits if max_splits else workers * 2) * group if combine else 0
    partial = torch.empty(parts * (head_dim + 1), dtype=torch.float32, device=device)
    partial_lse = partial[parts * head_dim :]
    block_b = max(triton.next_power_of_2(batch), 16)
    # fmt: off
    _decode_kernel[(workers,)](
        q_BHD, k_NKD, v_NKV, page_table_BP, cache_seqlens_B, sinks_H, out, lse, partial, partial_lse,
        scale, softcap, batch, q_BHD.stride(0), q_BHD.stride(1), k_NKD.stride(1), v_NKV.stride(1),
        out.stride(0), out.stride(1), page_table_BP.stride(0),
        KV_HEADS=kv_heads, GROUP=group, BLOCK_B=block_b, BLOCK_H=max(triton.next_power_of_2(group), 16),
        MAX_SPLITS=max_splits, MIN_TILES=min_tiles, HEAD_DIM=head_dim, BLOCK_D=block_dim(head_dim),
        PAGE_SIZE=page_size, BLOCK_N=config.block_n, STRIDE_KN=k_NKD.stride(0), STRIDE_VN=v_NKV.stride(0),
        WINDOW=window, CHUNK=chunk, HAS_SOFTCAP=softcap > 0, OVERLAP=overlap,
        num_warps=config.num_warps, num_stages=config.num_stages)
    if combine:
        _combine_kernel[(batch * heads,)](
            cache_seqlens_B, sinks_H, out, lse, partial, partial_lse, batch, workers,
            out.stride(0), out.stride(1), KV_HEADS=kv_heads, GROUP=group, BLOCK_B=block_b, BLOCK_S=16,
            MAX_SPLITS=max_splits, MIN_TILES=min_tiles, HEAD_DIM=head_dim, BLOCK_D=block_dim(head_dim),
            BLOCK_N=config.block_n, WINDOW=window, CHUNK=chunk, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}))
    # fmt: on
    return out, lse
