"""Extend attention: many new tokens a request (prefill, chunked prefill, prefix-cache hit) over a paged cache.

Shape suffixes: T query tokens of the ragged batch, B requests, H query heads, K KV heads, D head dim, V value
head dim (= D), N slots, P pages of a request.

Flash-attention 2 (Dao 2023) with the query heads of one KV head packed beside the tokens: a tile of BLOCK_M
rows is BLOCK_M // group tokens times the group, so a tile of K and V serves all of them. The tiles of all
requests stand in one list, which a program searches with a prefix sum of the query lengths: the grid is sized
by the numbers of query tokens and requests, and a batch of one long and many short requests starts next to no
idle program. The list is walked from its end, so that the tiles with the most keys come first. Keys before a
tile's first diagonal element need no mask: they make the main loop.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
    online_softmax,
    sink_factor,
)


@dataclass(frozen=True)
class ExtendConfig:
    """How the kernel is launched: rows (tokens x heads of a group) and keys a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def extend_config(head_dim: int, group: int, itemsize: int, page_size: int) -> ExtendConfig:
    """Launch configuration by shape."""
    if itemsize == 4:  # exact float32 products: no tensor cores, and the operands live in registers
        return ExtendConfig(block_m=32, block_n=16, num_warps=8, num_stages=2)
    if head_dim <= 64:
        return ExtendConfig(block_m=128, block_n=128, num_warps=8, num_stages=2)
    if head_dim <= 128:
        return ExtendConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return ExtendConfig(block_m=128, block_n=32, num_warps=8, num_stages=2)


# fmt: off
@triton.jit
def _mask(scores, start, positions, high, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
          CHUNK: tl.constexpr):
    """Scores of the key tile at `start`, -inf where the row's position may not see the key."""
    key = (start + tl.arange(0, BLOCK_N))[None, :]
    allowed = key < high
    if CAUSAL:
        allowed = allowed & (key <= positions[:, None])
    if WINDOW > 0 or CHUNK > 0:
        allowed = allowed & (key >= first_allowed(positions, WINDOW, CHUNK)[:, None])
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def _masked_tiles(acc, norm, peak, q, positions, k_head, v_head, table, first, low, high, scale, softcap,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
                  STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                  CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Attend to the keys [first, high), in tiles from `low` on, of which some rows may not see some keys."""
    # Page ids are fetched one tile ahead: the loads of K and V then depend on nothing that is still under way.
    pages = load_pages(table, low, high, PAGE_SIZE, BLOCK_N, True)
    for start in tl.range(low, high, BLOCK_N):
        k = load_tile(k_head, pages, start, first, high, STRIDE_KN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_head, pages, start, first, high, STRIDE_VN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        pages = load_pages(table, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = _mask(scores, start, positions, high, BLOCK_N, CAUSAL, WINDOW, CHUNK)
        p, shrink, norm, peak = online_softmax(scores, norm, peak, scale, softcap, HAS_SOFTCAP)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, norm, peak


@triton.jit
def _main_tiles(acc, norm, peak, q, positions, k_head, v_head, table, low, top, high, scale, softcap,
                HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
                STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Attend to the tiles from the one at `top`, which alone is masked, down to the one at `low`.

    The scores of a tile are computed one step ahead of their softmax (as flash-attention 3 does), so that the tensor
    cores have the next q.k and the last p.v to work on while the softmax runs. Page ids are fetched a step before they
    are needed, for K and V apart: a value handed on through two steps would keep the compiler from pipelining the loop.
    """
    v_pages = load_pages(table, top, high, PAGE_SIZE, BLOCK_N, True)
    k = load_tile(k_head, v_pages, top, low, high, STRIDE_KN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    k_pages = load_pages(table, tl.maximum(top - BLOCK_N, low), high, PAGE_SIZE, BLOCK_N, True)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = _mask(scores, top, positions, high, BLOCK_N, CAUSAL, WINDOW, CHUNK)
    for done in tl.range(0, top - low, BLOCK_N):
        start = top - BLOCK_N - done
        last = start + BLOCK_N
        k = load_tile(k_head, k_pages, start, low, high, STRIDE_KN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, False)
        v = load_tile(v_head, v_pages, last, low, high, STRIDE_VN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v_pages = load_pages(table, start, high, PAGE_SIZE, BLOCK_N, False)
        k_pages = load_pages(table, tl.maximum(start - BLOCK_N, low), high, PAGE_SIZE, BLOCK_N, False)
        next_scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, shrink, norm, peak = online_softmax(scores, norm, peak, scale, softcap, HAS_SOFTCAP)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        scores = next_scores
    v = load_tile(v_head, v_pages, low, low, high, STRIDE_VN, PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    p, shrink, norm, peak = online_softmax(scores, norm, peak, scale, softcap, HAS_SOFTCAP)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, norm, peak


@triton.jit(do_not_specialize=["batch"])
def _extend_kernel(q_ptr, k_ptr, v_ptr, table_ptr, seqlens_ptr, starts_ptr, sinks_ptr, out_ptr, lse_ptr,
                   scale, softcap, batch,
                   stride_qt, stride_qh, stride_kh, stride_vh, stride_ot, stride_oh, stride_tb,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
                   STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                   CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    requests = tl.arange(0, BLOCK_B)
    starts = tl.load(starts_ptr + requests, mask=requests < batch, other=0)
    stops = tl.load(starts_ptr + 1 + requests, mask=requests < batch, other=0)
    all_tiles = tl.cdiv(stops - starts, TOKENS)
    ends = tl.cumsum(all_tiles, 0)
    total = tl.sum(all_tiles, 0)
    # All KV heads of a tile side by side, and the tiles from the last one on: the long ones of a request come first.
    head = tl.program_id(0) % KV_HEADS
    tile = total - 1 - tl.program_id(0) // KV_HEADS
    if tile >= 0:
        request = tl.sum((ends <= tile).to(tl.int32), 0)
        tile -= tl.sum(tl.where(ends <= tile, all_tiles, 0), 0)
        start = tl.load(starts_ptr + request)
        q_len = tl.load(starts_ptr + request + 1) - start
        seqlen = tl.load(seqlens_ptr + request)

        rows = tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_D)
        tokens = tile * TOKENS + rows // GROUP
        live = (rows < TOKENS * GROUP) & (tokens < q_len)
        in_head = head_mask(live, HEAD_DIM, BLOCK_D)
        q_heads = head * GROUP + rows % GROUP
        at = (start + tokens).to(tl.int64)
        q_rows = q_ptr + (at * stride_qt + q_heads * stride_qh)
        q = tl.load(q_rows[:, None] + cols[None, :], mask=in_head, other=0.0)

        # What the tile's rows may see: [first, high) any of them, [low_all, high_all) all of them, in whole tiles.
        positions = seqlen - q_len + tokens
        first_position = seqlen - q_len + tile * TOKENS
        last_position = tl.minimum(first_position + TOKENS, seqlen) - 1
        high = seqlen
        high_all = seqlen
        if CAUSAL:
            high = last_position + 1
            high_all = tl.maximum(tl.minimum(first_position + 1, seqlen), 0)
        high_all = high_all // BLOCK_N * BLOCK_N
        low = tl.zeros([], tl.int32)
        k_head = k_ptr + head * stride_kh
        v_head = v_ptr + head * stride_vh
        table = table_ptr + request.to(tl.int64) * stride_tb
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        if WINDOW > 0 or CHUNK > 0:
            first = first_allowed(tl.maximum(first_position, 0), WINDOW, CHUNK)
            low = tl.cdiv(first_allowed(tl.maximum(last_position, 0), WINDOW, CHUNK), BLOCK_N) * BLOCK_N
            low = tl.minimum(low, high)
            high_all = tl.maximum(high_all, low)
            acc, norm, peak = _masked_tiles(
                acc, norm, peak, q, positions, k_head, v_head, table, first, first // BLOCK_N * BLOCK_N, low, scale,
                softcap, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, STRIDE_KN, STRIDE_VN, CAUSAL, WINDOW, CHUNK,
                HAS_SOFTCAP)
        # The main loop begins with one masked tile; there are more only if the rows' positions straddle tiles.
        top = tl.minimum(high_all, (tl.cdiv(high, BLOCK_N) - 1) * BLOCK_N)
        acc, norm, peak = _masked_tiles(
            acc, norm, peak, q, positions, k_head, v_head, table, low, top + BLOCK_N, high, scale,
            softcap, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, STRIDE_KN, STRIDE_VN, CAUSAL, WINDOW, CHUNK,
            HAS_SOFTCAP)
        if top >= low:
            acc, norm, peak = _main_tiles(
                acc, norm, peak, q, positions, k_head, v_head, table, low, top, high, scale,
                softcap, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, STRIDE_KN, STRIDE_VN, CAUSAL, WINDOW, CHUNK,
                HAS_SOFTCAP)

        # norm is 0 only where nothing was allowed: then out is 0 and lse -inf.
        norm = tl.where(norm > 0, norm, 1.0)
        lse2 = tl.where(peak > LOWEST, peak + tl.log2(norm), float("-inf"))
        factor = 1.0 / norm
        if sinks_ptr is not None:
            factor *= sink_factor(tl.load(sinks_ptr + q_heads, mask=live, other=0.0), lse2)
        out_rows = out_ptr + (at * stride_ot + q_heads * stride_oh)
        out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows[:, None] + cols[None, :], out, mask=in_head)
        if lse_ptr is not None:
            tl.store(lse_ptr + at * (KV_HEADS * GROUP) + q_heads, lse2 * LN2, mask=live)
# fmt: on


def paged_extend(
    q_THD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKV: torch.Tensor,
    page_table_BP: torch.Tensor,
    cache_seqlens_B: torch.Tensor,
    cu_seqlens_q_B1: torch.Tensor,
    *,
    page_size: int,
    max_seq_len_q: int,
    max_seq_len_k: int,
    scale: float,
    causal: bool = True,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    sinks_H: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    _config: ExtendConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the last tokens of each request to its `cache_seqlens_B` keys, theirs among them.

    Args:
        q_THD: queries, float16, bfloat16 or float32; may be strided, the last dimension contiguous.
        k_NKD, v_NKV: pools by slot, of q's dtype; slots not in use may hold anything, NaN too.
        page_table_BP: int32 page ids; entries past a request's last page are never used.
        cache_seqlens_B: int32 lengths in tokens. cu_seqlens_q_B1: int32, where a request's queries start.
        page_size: slots a page. max_seq_len_q, max_seq_len_k: upper bounds; T and B size the grid.
        scale: factor on q.k, positive. softcap: s * tanh(score / s) if above 0.
        causal: keys up to the query's position, or all keys. window: so many keys up to the query's
            position. chunk: keys from the last multiple of chunk on. 0 is no such limit.
        sinks_H: one more logit a head in the denominator.

    Returns:
        out_THV in q's dtype, and float32 LSE_TH (natural, without the sink) if `return_lse`. A query that
        may see nothing gets zeros and -inf.
    """
    tokens, heads, head_dim = q_THD.shape
    batch, kv_heads = cache_seqlens_B.shape[0], k_NKD.shape[1]
    group = heads // kv_heads
    assert group * kv_heads == heads and scale > 0
    assert head_dim == k_NKD.shape[2] == v_NKV.shape[2], "K and V have q's head dim"
    assert q_THD.stride(2) == k_NKD.stride(2) == v_NKV.stride(2) == 1
    config = _config or extend_config(head_dim, group, q_THD.element_size(), page_size)
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=q_THD.dtype, device=q_THD.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q_THD.device) if return_lse else None
    if tokens == 0:
        return out, lse
    block_m = max(config.block_m, triton.next_power_of_2(group))
    tile_tokens = block_m // group
    # A request has at most one tile that is not full.
    tiles = min(tokens // tile_tokens + batch, triton.cdiv(max_seq_len_q, tile_tokens) * batch)
    # fmt: off
    _extend_kernel[(tiles * kv_heads,)](
        q_THD, k_NKD, v_NKV, page_table_BP, cache_seqlens_B, cu_seqlens_q_B1, sinks_H, out, lse,
        scale, softcap, batch, q_THD.stride(0), q_THD.stride(1), k_NKD.stride(1), v_NKV.stride(1),
        out.stride(0), out.stride(1), page_table_BP.stride(0),
        KV_HEADS=kv_heads, GROUP=group, BLOCK_B=max(triton.next_power_of_2(batch), 16), BLOCK_M=block_m,
        HEAD_DIM=head_dim, BLOCK_D=block_dim(head_dim), PAGE_SIZE=page_size, BLOCK_N=config.block_n,
        STRIDE_KN=k_NKD.stride(0), STRIDE_VN=v_NKV.stride(0), CAUSAL=causal, WINDOW=window, CHUNK=chunk,
        HAS_SOFTCAP=softcap > 0, num_warps=config.num_warps, num_stages=config.num_stages)
    # fmt: on
    return out, lse
