"""Rotary embedding fused with the write of K and V into the paged pool: one launch a layer.

Shapes: T tokens, N slots of the pool, H query heads, K KV heads, D head dim, V value head dim, X positions of
the table. A program takes one token and either some query heads (rotated in place) or some KV heads (K
rotated and written to the pool, V written). Fusing saves a launch and one trip of K and V through memory;
SGLang and vLLM do the same.
Idea of the embedding: Su et al., "RoFormer" (2021), in the half-split (NeoX) order of Llama checkpoints.

Slot offsets are int64: a pool may have more than 2^31 elements. Padded tokens all point at slot 0, whose
content is never read, so that they race there does no harm.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_heads(src, dst, cos, sin, head_mask, half, HALF: tl.constexpr):
    """Rotate each head from ``src`` to ``dst``: pointers to the heads' first elements, [heads, 1]."""
    mask = head_mask[:, None] & (half < HALF)[None, :]
    low = tl.load(src + half[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(src + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + half[None, :], (low * cos - high * sin).to(dst.dtype.element_ty), mask=mask)
    tl.store(dst + HALF + half[None, :], (high * cos + low * sin).to(dst.dtype.element_ty), mask=mask)


@triton.jit
def _copy_heads(src, dst, head_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    mask = head_mask[:, None] & (col < WIDTH)[None, :]
    tl.store(
        dst + col[None, :],
        tl.load(src + col[None, :], mask=mask, other=0.0).to(dst.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _rope_write_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    loc_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    k_cache_stride_n,
    k_cache_stride_h,
    v_cache_stride_n,
    v_cache_stride_h,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    Q_PARTS: tl.constexpr = (H + Q_HEADS - 1) // Q_HEADS
    PARTS: tl.constexpr = Q_PARTS + (K + KV_HEADS - 1) // KV_HEADS
    pid = tl.program_id(0)
    token = (pid // PARTS).to(tl.int64)
    part = pid % PARTS
    half = tl.arange(0, BLOCK_HALF)
    table = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(table + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(table + HALF + half, mask=half < HALF, other=0.0)[None, :]
    if part < Q_PARTS:
        q_head = part * Q_HEADS + tl.arange(0, Q_HEADS)
        q = q_ptr + token * q_stride_t + (q_head * q_stride_h)[:, None]
        _rotate_heads(q, q, cos, sin, q_head < H, half, HALF)
    else:
        kv_head = (part - Q_PARTS) * KV_HEADS + tl.arange(0, KV_HEADS)
        slot = tl.load(loc_ptr + token).to(tl.int64)
        k = k_ptr + token * k_stride_t + (kv_head * k_stride_h)[:, None]
        k_cache = k_cache_ptr + slot * k_cache_stride_n + (kv_head * k_cache_stride_h)[:, None]
        _rotate_heads(k, k_cache, cos, sin, kv_head < K, half, HALF)
        v = v_ptr + token * v_stride_t + (kv_head * v_stride_h)[:, None]
        v_cache = v_cache_ptr + slot * v_cache_stride_n + (kv_head * v_cache_stride_h)[:, None]
        _copy_heads(v, v_cache, kv_head < K, V, BLOCK_V)


@triton.jit
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    loc_ptr,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    k_cache_stride_n,
    k_cache_stride_h,
    v_cache_stride_n,
    v_cache_stride_h,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    PARTS: tl.constexpr = (K + KV_HEADS - 1) // KV_HEADS
    pid = tl.program_id(0)
    token = (pid // PARTS).to(tl.int64)
    head = (pid % PARTS) * KV_HEADS + tl.arange(0, KV_HEADS)
    slot = tl.load(loc_ptr + token).to(tl.int64)
    k = k_ptr + token * k_stride_t + (head * k_stride_h)[:, None]
    k_cache = k_cache_ptr + slot * k_cache_stride_n + (head * k_cache_stride_h)[:, None]
    _copy_heads(k, k_cache, head < K, D, BLOCK_D)
    v = v_ptr + token * v_stride_t + (head * v_stride_h)[:, None]
    v_cache = v_cache_ptr + slot * v_cache_stride_n + (head * v_cache_stride_h)[:, None]
    _copy_heads(v, v_cache, head < K, V, BLOCK_V)


def _heads(num_heads: int, head_dim: int, elements: int) -> int:
    """A power of two of heads, about ``elements`` elements together, no more than cover ``num_heads``."""
    return min(triton.next_power_of_2(num_heads), max(1, elements // triton.next_power_of_2(head_dim)))


@cache
def launch_config(q_heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> tuple[int, int, int]:
    """(query heads of a program, KV heads of one, warps). K and V together are as much work as the queries."""
    return _heads(q_heads, head_dim, 2048), _heads(kv_heads, max(head_dim, v_head_dim), 1024), 4


def write_kv(
    k_TKD: Tensor, v_TKV: Tensor, k_cache_NKD: Tensor, v_cache_NKV: Tensor, out_cache_loc_T: Tensor
) -> None:
    """Write the K and V of every token to its slot ``out_cache_loc_T`` (int64), in the dtype of the caches.

    Tokens, slots and heads may be strided; the last dimension of every tensor is contiguous.
    """
    num_tokens, num_heads, head_dim = k_TKD.shape
    v_head_dim = v_TKV.shape[2]
    assert k_TKD.stride(2) == v_TKV.stride(2) == k_cache_NKD.stride(2) == v_cache_NKV.stride(2) == 1
    _, heads, warps = launch_config(num_heads, num_heads, head_dim, v_head_dim)
    _write_kv_kernel[(num_tokens * triton.cdiv(num_heads, heads),)](
        k_TKD, v_TKV, k_cache_NKD, v_cache_NKV, out_cache_loc_T,
        k_TKD.stride(0), k_TKD.stride(1), v_TKV.stride(0), v_TKV.stride(1),
        k_cache_NKD.stride(0), k_cache_NKD.stride(1), v_cache_NKV.stride(0), v_cache_NKV.stride(1),
        num_heads, head_dim, triton.next_power_of_2(head_dim), v_head_dim, triton.next_power_of_2(v_head_dim), heads,
        num_warps=warps,
    )  # fmt: skip


def rope_write_kv(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKV: Tensor,
    cos_sin_XD: Tensor,
    positions_T: Tensor,
    k_cache_NKD: Tensor,
    v_cache_NKV: Tensor,
    out_cache_loc_T: Tensor,
) -> None:
    """Rotate q in place; write rotated K, and V, to the slots ``out_cache_loc_T``; k and v stay.

    ``cos_sin_XD`` is float32 [positions, D] = cos(D/2) | sin(D/2) and contiguous; ``positions_T`` and
    ``out_cache_loc_T`` are int64. q, k and v may be views of a fused projection; the last dimension of every
    tensor is contiguous.
    """
    num_tokens, q_heads, head_dim = q_THD.shape
    kv_heads, v_head_dim = v_TKV.shape[1:]
    assert q_THD.stride(2) == k_TKD.stride(2) == v_TKV.stride(2) == 1
    assert k_cache_NKD.stride(2) == v_cache_NKV.stride(2) == 1
    assert head_dim % 2 == 0
    assert cos_sin_XD.shape[1] == head_dim
    assert cos_sin_XD.is_contiguous()
    q_part, kv_part, warps = launch_config(q_heads, kv_heads, head_dim, v_head_dim)
    half = head_dim // 2
    _rope_write_kv_kernel[(num_tokens * (triton.cdiv(q_heads, q_part) + triton.cdiv(kv_heads, kv_part)),)](
        q_THD, k_TKD, v_TKV, cos_sin_XD, positions_T, k_cache_NKD, v_cache_NKV, out_cache_loc_T,
        q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1), v_TKV.stride(0), v_TKV.stride(1),
        k_cache_NKD.stride(0), k_cache_NKD.stride(1), v_cache_NKV.stride(0), v_cache_NKV.stride(1),
        q_heads, kv_heads, half, triton.next_power_of_2(half), v_head_dim, triton.next_power_of_2(v_head_dim),
        q_part, kv_part, num_warps=warps,
    )  # fmt: skip
