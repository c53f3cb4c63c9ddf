"""Keys and values out of their pages into one contiguous buffer, in one launch: what an engine does whose attention
kernel knows no page table.

Shapes: N slots, K KV heads, D head dim, V value head dim, B requests, P pages of a row of the page table, G tokens of
the buffers. Nothing is read back and the grid depends on shapes alone, so a CUDA graph may hold it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # elements that a program copies at a time
_PROGRAMS = 4096  # about as many as are resident on a large GPU, a few times over: requests differ in length


@triton.jit
def _copy(source_ptr, out_ptr, slots, targets, live, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of ROW elements from `slots` to `targets`; zeros where not `live`."""
    cols = tl.arange(0, BLOCK)
    own = (cols < ROW)[None, :]
    found = tl.load(
        source_ptr + (slots.to(tl.int64) * ROW)[:, None] + cols[None, :], mask=live[:, None] & own, other=0.0
    )
    return found, out_ptr + (targets.to(tl.int64) * ROW)[:, None] + cols[None, :], own


@triton.jit(do_not_specialize=["batch", "programs"])
def _gather_kernel(k_ptr, v_ptr, table_ptr, seqlens_ptr, starts_ptr, k_out_ptr, v_out_ptr, batch, programs, stride_tb,
                   PAGE_SIZE: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr, BLOCK_K: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    request = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * BLOCK_T
    start = tl.load(starts_ptr + request)  # that of one request more than there are is the end
    length = TAIL
    if request < batch:
        length = tl.load(seqlens_ptr + request)
    table = table_ptr + request.to(tl.int64) * stride_tb
    for token in range(first, length, programs * BLOCK_T):
        tokens = token + tl.arange(0, BLOCK_T)
        inside = tokens < length
        pages = tl.load(table + tokens // PAGE_SIZE, mask=inside & (request < batch), other=0)
        slots = pages * PAGE_SIZE + tokens % PAGE_SIZE
        k, k_at, k_own = _copy(k_ptr, k_out_ptr, slots, start + tokens, inside & (pages != 0), ROW_K, BLOCK_K)
        v, v_at, v_own = _copy(v_ptr, v_out_ptr, slots, start + tokens, inside & (pages != 0), ROW_V, BLOCK_V)
        tl.store(k_at, k, mask=inside[:, None] & k_own)
        tl.store(v_at, v, mask=inside[:, None] & v_own)


def gather_kv(
    k_cache_NKD: Tensor,
    v_cache_NKV: Tensor,
    page_table_BP: Tensor,
    cache_seqlens_B: Tensor,
    starts_B1: Tensor,
    page_size: int,
    k_out_GKD: Tensor,
    v_out_GKV: Tensor,
    tail: int = 0,
) -> None:
    """Token j of request b goes to ``starts[b] + j``, and `tail` rows of zeros to ``starts[B]`` on.

    Integers are int32; caches and outputs are of one dtype and contiguous, and requests must not overlap. What lies in
    page 0, the sink, becomes zeros: padded entries read it, and a kernel may multiply by zero what follows a request.
    """
    batch, num_pages = page_table_BP.shape
    row_k, row_v = k_cache_NKD.stride(0), v_cache_NKV.stride(0)
    assert k_cache_NKD.is_contiguous() and v_cache_NKV.is_contiguous()
    assert k_out_GKD.is_contiguous() and v_out_GKV.is_contiguous()
    assert k_out_GKD.shape[1:] == k_cache_NKD.shape[1:] and v_out_GKV.shape[1:] == v_cache_NKV.shape[1:]
    assert starts_B1.shape == (batch + 1,) and page_table_BP.stride(1) == 1
    block_k, block_v = triton.next_power_of_2(row_k), triton.next_power_of_2(row_v)
    block_t = max(_TILE // max(block_k, block_v), 1)
    programs = max(1, min(triton.cdiv(num_pages * page_size, block_t), _PROGRAMS // batch))
    _gather_kernel[((batch + (tail > 0)) * programs,)](
        k_cache_NKD, v_cache_NKV, page_table_BP, cache_seqlens_B, starts_B1, k_out_GKD, v_out_GKV,
        batch, programs, page_table_BP.stride(0), page_size, row_k, row_v, block_k, block_v, block_t, tail, num_warps=8,
    )  # fmt: skip
