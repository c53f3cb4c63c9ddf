"""Extend attention: many new tokens a request (prefill, chunked prefill, prefix-cache hit) over a paged KV cache.

Shape suffixes: T query tokens of the ragged batch, B requests, H query heads, K KV heads, D head dim, V value head
dim (= D), N slots, P pages of a request.

Flash-attention 2 (Dao 2023) with the query heads of one KV head packed beside the tokens: a tile of BLOCK_M rows is
BLOCK_M // group tokens times the group, so a tile of K and V serves all of them. The tiles of all requests stand in one
list, which a program searches with a prefix sum of the query lengths: the grid is the number of query tokens and
requests, and a batch of one long and many short requests starts next to no idle program. The list is walked from its
end, so that the tiles with the most keys come first. Keys before a tile's first diagonal element need no mask; they
make the main loop, and the masked tiles at both ends of the range are walked apart.
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
    first_allowed,
    load_pages,
    load_tile,
    log2_scores,
    sink_factor,
)


@dataclass(frozen=True)
class ExtendConfig:
    """How the kernel is launched: rows (tokens x heads of a group) and keys a tile, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def extend_config(head_dim: int, group: int, itemsize: int, page_size: int) -> ExtendConfig:
    """Launch configuration by shape."""
    if itemsize == 4:
        return ExtendConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    if head_dim <= 128:
        return ExtendConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return ExtendConfig(block_m=128, block_n=32, num_warps=8, num_stages=3)


@triton.jit
def _walk(acc, norm, peak, q, positions, k_head, v_head, table, low, high, stride_kn, stride_vn,
          scale, softcap, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
          CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
          MASKED: tl.constexpr):
    """Attend to the key tiles [low, high); without MASKED every row may see every key of them."""
    keys = tl.arange(0, BLOCK_N)
    # Page ids are fetched one tile ahead: the loads of K and V then depend on nothing that is still under way.
    pages = load_pages(table, low, high, PAGE_SIZE, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        k = load_tile(k_head, pages, start, 0, high, stride_kn, PAGE_SIZE, BLOCK_N, HEAD_DIM, MASKED)
        v = load_tile(v_head, pages, start, 0, high, stride_vn, PAGE_SIZE, BLOCK_N, HEAD_DIM, MASKED)
        pages = load_pages(table, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N)
        scores = log2_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            key = (start + keys)[None, :]
            allowed = key < high
            if CAUSAL:
                allowed = allowed & (key <= positions[:, None])
            if WINDOW > 0 or CHUNK > 0:
                allowed = allowed & (key >= first_allowed(positions, WINDOW, CHUNK)[:, None])
            scores = tl.where(allowed, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, norm, peak


@triton.jit
def _extend_kernel(q_ptr, k_ptr, v_ptr, table_ptr, seqlens_ptr, starts_ptr, sinks_ptr, out_ptr, lse_ptr,
                   scale, softcap, batch,
                   stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_ot, stride_oh, stride_tb,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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
        cols = tl.arange(0, HEAD_DIM)
        tokens = tile * TOKENS + rows // GROUP
        live = (rows < TOKENS * GROUP) & (tokens < q_len)
        q_heads = head * GROUP + rows % GROUP
        at = (start + tokens).to(tl.int64)
        q = tl.load(q_ptr + (at * stride_qt + q_heads * stride_qh)[:, None] + cols[None, :], mask=live[:, None], other=0.0)

        # What the tile's rows may see: [low, high) any of them, [low_all, high_all) all of them, in whole tiles.
        positions = seqlen - q_len + tokens
        first_position = seqlen - q_len + tile * TOKENS
        last_position = tl.minimum(first_position + TOKENS, seqlen) - 1
        low = tl.maximum(first_allowed(first_position, WINDOW, CHUNK), 0) // BLOCK_N * BLOCK_N
        high = seqlen
        high_all = seqlen
        if CAUSAL:
            high = last_position + 1
            high_all = tl.maximum(tl.minimum(first_position + 1, seqlen), 0)
        high_all = high_all // BLOCK_N * BLOCK_N
        k_head = k_ptr + head * stride_kh
        v_head = v_ptr + head * stride_vh
        table = table_ptr + request.to(tl.int64) * stride_tb
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        if WINDOW > 0 or CHUNK > 0:
            low_all = tl.cdiv(tl.maximum(first_allowed(last_position, WINDOW, CHUNK), 0), BLOCK_N) * BLOCK_N
            low_all = tl.minimum(low_all, high)
            high_all = tl.maximum(high_all, low_all)
            acc, norm, peak = _walk(acc, norm, peak, q, positions, k_head, v_head, table, low, low_all,
                                    stride_kn, stride_vn, scale, softcap, PAGE_SIZE, BLOCK_N, HEAD_DIM, CAUSAL, WINDOW,
                                    CHUNK, HAS_SOFTCAP, True)
            low = low_all
        acc, norm, peak = _walk(acc, norm, peak, q, positions, k_head, v_head, table, low, high_all,
                                stride_kn, stride_vn, scale, softcap, PAGE_SIZE, BLOCK_N, HEAD_DIM, CAUSAL, WINDOW,
                                CHUNK, HAS_SOFTCAP, False)
        acc, norm, peak = _walk(acc, norm, peak, q, positions, k_head, v_head, table, high_all, high,
                                stride_kn, stride_vn, scale, softcap, PAGE_SIZE, BLOCK_N, HEAD_DIM, CAUSAL, WINDOW,
                                CHUNK, HAS_SOFTCAP, True)

        # norm is 0 only where nothing was allowed: then out is 0 and lse -inf.
        norm = tl.where(norm > 0, norm, 1.0)
        lse2 = tl.where(peak > LOWEST, peak + tl.log2(norm), float("-inf"))
        factor = 1.0 / norm
        if sinks_ptr is not None:
            factor *= sink_factor(tl.load(sinks_ptr + q_heads, mask=live, other=0.0), lse2)
        out = out_ptr + (at * stride_ot + q_heads * stride_oh)[:, None] + cols[None, :]
        tl.store(out, (acc * factor[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
        if lse_ptr is not None:
            tl.store(lse_ptr + at * (KV_HEADS * GROUP) + q_heads, lse2 * LN2, mask=live)


def paged_extend(q_THD: torch.Tensor, k_NKD: torch.Tensor, v_NKV: torch.Tensor, page_table_BP: torch.Tensor,
                 cache_seqlens_B: torch.Tensor, cu_seqlens_q_B1: torch.Tensor, *, page_size: int, max_seq_len_q: int,
                 max_seq_len_k: int, scale: float, causal: bool = True, softcap: float = 0.0, window: int = 0,
                 chunk: int = 0, sinks_H: torch.Tensor | None = None, out: torch.Tensor | None = None,
                 return_lse: bool = False, _config: ExtendConfig | None = None,
                 ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of each request's last tokens, those between its two `cu_seqlens_q_B1`, to its `cache_seqlens_B` keys.

    Args:
        q_THD: queries, float16, bfloat16 or float32; may be strided, the last dimension contiguous.
        k_NKD, v_NKV: pools by slot, same dtype; slots that no request uses may hold anything, NaN too.
        page_table_BP: int32 page ids; entries past a request's last page are never used.
        cache_seqlens_B: int32 lengths in tokens, the new ones among them. cu_seqlens_q_B1: int32, where queries start.
        page_size: slots a page. max_seq_len_q, max_seq_len_k: upper bounds (the grid is sized by T and B alone).
        scale: factor on q.k, positive. causal: or every query sees all keys. softcap: s * tanh(score / s) if above 0.
        window, chunk: see `Band` of the masks. sinks_H: one more logit a head in the denominator.

    Returns:
        out_THV in q's dtype, and float32 LSE_TH (natural, without the sink) if `return_lse`. A query that may see
        nothing gets zeros and -inf.
    """
    tokens, heads, head_dim = q_THD.shape
    batch = cache_seqlens_B.shape[0]
    kv_heads = k_NKD.shape[1]
    group = heads // kv_heads
    assert group * kv_heads == heads and v_NKV.shape[2] == head_dim == k_NKD.shape[2], "one head dim, whole groups"
    assert q_THD.stride(2) == k_NKD.stride(2) == v_NKV.stride(2) == 1
    config = _config or extend_config(head_dim, group, q_THD.element_size(), page_size)
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q_THD.device) if return_lse else None
    if tokens == 0:
        return out, lse
    # A request has at most one tile that is not full.
    tiles = min(tokens // (config.block_m // group) + batch, -(-max_seq_len_q // (config.block_m // group)) * batch)
    _extend_kernel[(tiles * kv_heads,)](
        q_THD, k_NKD, v_NKV, page_table_BP, cache_seqlens_B, cu_seqlens_q_B1, sinks_H, out, lse, scale, softcap, batch,
        q_THD.stride(0), q_THD.stride(1), k_NKD.stride(0), k_NKD.stride(1), v_NKV.stride(0), v_NKV.stride(1),
        out.stride(0), out.stride(1), page_table_BP.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, CAUSAL=causal, WINDOW=window,
        CHUNK=chunk, HAS_SOFTCAP=softcap > 0, BLOCK_B=max(triton.next_power_of_2(batch), 16), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages)
    return out, lse
