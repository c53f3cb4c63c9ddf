"""The integer work of a pass on the device: attention metadata, and the step from one decode to the next.

Shapes: B requests, R rows and W columns of ``req_to_token``, P pages of a row of the page table.
Each is one launch and reads nothing back, so a CUDA graph may hold it: the grid depends on the shapes of the
outputs alone, and programs past the length of their request have nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PAGES_BLOCK = 1024
_PAGES_PROGRAMS = 1024  # about as many as are resident on a large GPU; they stride over longer tables


@triton.jit
def _fill_lengths(
    seq_lens_ptr,
    extend_seq_lens_ptr,
    cache_seqlens_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_requests,
    BLOCK: tl.constexpr,
):
    tl.store(cu_q_ptr, 0)
    tl.store(cu_k_ptr, 0)
    q_before = tl.zeros((), tl.int32)
    k_before = tl.zeros((), tl.int32)
    for start in range(0, num_requests, BLOCK):
        request = start + tl.arange(0, BLOCK)
        mask = request < num_requests
        k_len = tl.load(seq_lens_ptr + request, mask=mask, other=0).to(tl.int32)
        tl.store(cache_seqlens_ptr + request, k_len, mask=mask)
        tl.store(cu_k_ptr + 1 + request, k_before + tl.cumsum(k_len, 0), mask=mask)
        k_before += tl.sum(k_len, 0)
        if extend_seq_lens_ptr is None:
            tl.store(cu_q_ptr + 1 + request, request + 1, mask=mask)
        else:
            q_len = tl.load(extend_seq_lens_ptr + request, mask=mask, other=0).to(tl.int32)
            tl.store(cu_q_ptr + 1 + request, q_before + tl.cumsum(q_len, 0), mask=mask)
            q_before += tl.sum(q_len, 0)


@triton.jit(do_not_specialize=["num_requests", "num_pages", "page_table_stride_b", "programs_per_request"])
def _fill_metadata_kernel(
    req_to_token_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    extend_seq_lens_ptr,
    cache_seqlens_ptr,
    cu_q_ptr,
    cu_k_ptr,
    page_table_ptr,
    num_requests,
    num_pages,
    req_to_token_stride_r,
    page_table_stride_b,
    programs_per_request,
    PAGE_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        _fill_lengths(
            seq_lens_ptr, extend_seq_lens_ptr, cache_seqlens_ptr, cu_q_ptr, cu_k_ptr, num_requests, BLOCK_B
        )
    else:
        request = (pid - 1) // programs_per_request
        first = (pid - 1) % programs_per_request * BLOCK_P
        pages = (tl.load(seq_lens_ptr + request).to(tl.int32) + PAGE_SIZE - 1) // PAGE_SIZE
        pages = tl.minimum(pages, num_pages)
        slots_row = (
            req_to_token_ptr + tl.load(req_pool_indices_ptr + request).to(tl.int64) * req_to_token_stride_r
        )
        pages_row = page_table_ptr + request.to(tl.int64) * page_table_stride_b
        for start in range(first, pages, programs_per_request * BLOCK_P):
            page = start + tl.arange(0, BLOCK_P)
            slot = tl.load(slots_row + page * PAGE_SIZE, mask=page < pages, other=0)
            tl.store(pages_row + page, slot // PAGE_SIZE, mask=page < pages)


@triton.jit(do_not_specialize=["num_requests", "table_width"])
def _advance_decode_kernel(
    req_to_token_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    positions_ptr,
    out_cache_loc_ptr,
    num_requests,
    table_width,
    req_to_token_stride_r,
    BLOCK_B: tl.constexpr,
):
    request = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = request < num_requests
    row = tl.load(req_pool_indices_ptr + request, mask=mask, other=0).to(tl.int64)
    live = row != 0
    position = tl.where(live, tl.load(seq_lens_ptr + request, mask=mask, other=0), 0).to(tl.int64)
    slot_at = req_to_token_ptr + row * req_to_token_stride_r + position
    slot = tl.load(slot_at, mask=live & (position < table_width), other=0)
    tl.store(seq_lens_ptr + request, (position + 1).to(seq_lens_ptr.dtype.element_ty), mask=mask)
    tl.store(positions_ptr + request, position, mask=mask)
    tl.store(out_cache_loc_ptr + request, slot.to(tl.int64), mask=mask)


def programs_per_request(num_requests: int, num_pages: int) -> int:
    """How many programs share a row of the page table: enough for its width, but few for many rows."""
    return max(1, min(triton.cdiv(num_pages, _PAGES_BLOCK), _PAGES_PROGRAMS // num_requests))


def fill_metadata(
    req_to_token_RW: Tensor,
    req_pool_indices_B: Tensor,
    seq_lens_B: Tensor,
    extend_seq_lens_B: Tensor | None,
    page_size: int,
    cache_seqlens_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    page_table_BP: Tensor,
) -> None:
    """Fill ``cache_seqlens_B``, both cumulative lengths [B + 1] and the page table, all int32, in one launch.

    ``extend_seq_lens_B`` None means one new token for every request. ``page_table[b, j]`` is the page of
    token ``j * page_size`` of request b, for every page that the request has begun; later entries stay as
    they are. A table narrower than a request is filled to its width: who made it answers for the width.
    """
    num_requests, num_pages = page_table_BP.shape
    if num_requests == 0:  # a launch takes at least one program of a request
        cu_seqlens_q_B1.zero_()
        cu_seqlens_k_B1.zero_()
        return
    assert num_pages > 0
    assert cache_seqlens_B.shape == (num_requests,)
    assert cu_seqlens_k_B1.shape == (num_requests + 1,)
    assert page_table_BP.stride(1) == req_to_token_RW.stride(1) == 1
    per_request = programs_per_request(num_requests, num_pages)
    _fill_metadata_kernel[(1 + num_requests * per_request,)](
        req_to_token_RW, req_pool_indices_B, seq_lens_B, extend_seq_lens_B,
        cache_seqlens_B, cu_seqlens_q_B1, cu_seqlens_k_B1, page_table_BP,
        num_requests, num_pages, req_to_token_RW.stride(0), page_table_BP.stride(0), per_request,
        page_size, min(1024, triton.next_power_of_2(num_requests)), _PAGES_BLOCK, num_warps=4,
    )  # fmt: skip


def advance_decode(
    req_to_token_RW: Tensor,
    req_pool_indices_B: Tensor,
    seq_lens_B: Tensor,
    positions_B: Tensor,
    out_cache_loc_B: Tensor,
) -> None:
    """One more token for every request: its position, its slot and the new length, in place, in one launch.

    ``positions = seq_lens; seq_lens += 1; out_cache_loc = req_to_token[row, positions]``. Row 0 is padding:
    length 1, position 0, slot 0. A position past the table goes to slot 0, the sink: the host reserves slots
    ahead and raises there.
    """
    num_requests = seq_lens_B.shape[0]
    assert req_to_token_RW.stride(1) == 1
    assert positions_B.shape == out_cache_loc_B.shape == (num_requests,)
    _advance_decode_kernel[(triton.cdiv(num_requests, 128),)](
        req_to_token_RW, req_pool_indices_B, seq_lens_B, positions_B, out_cache_loc_B,
        num_requests, req_to_token_RW.shape[1], req_to_token_RW.stride(0), 128, num_warps=4,
    )  # fmt: skip
