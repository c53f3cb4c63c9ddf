"""A page table as compressed rows: each request's pages one after the other, and where they begin (as SGLang and vLLM
make them for FlashInfer).

Shapes: B requests, P pages of a row of the page table. One launch; it reads nothing back, and its grid depends on the
table's shape alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_P = 1024
_BLOCK_B = 256
_PROGRAMS = 1024  # about as many as are resident on a large GPU; they stride over longer tables


@triton.jit(do_not_specialize=["page_table_stride_b", "programs_per_request"])
def _compact_pages_kernel(
    page_table_ptr,
    cache_seqlens_ptr,
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    page_table_stride_b,
    programs_per_request,
    PAGE_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    request = tl.program_id(0) // programs_per_request
    part = tl.program_id(0) % programs_per_request
    before = tl.zeros((), tl.int32)  # pages of the requests before this one
    for start in range(0, request, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        lens = tl.load(cache_seqlens_ptr + other, mask=other < request, other=0)
        before += tl.sum((lens + PAGE_SIZE - 1) // PAGE_SIZE, 0)
    seq_len = tl.load(cache_seqlens_ptr + request)
    pages = (seq_len + PAGE_SIZE - 1) // PAGE_SIZE
    if part == 0:
        tl.store(indptr_ptr + request + 1, before + pages)
        tl.store(last_page_len_ptr + request, seq_len - (pages - 1) * PAGE_SIZE)
        if request == 0:
            tl.store(indptr_ptr, 0)
    row = page_table_ptr + request.to(tl.int64) * page_table_stride_b
    for start in range(part * BLOCK_P, pages, programs_per_request * BLOCK_P):
        column = start + tl.arange(0, BLOCK_P)
        page = tl.load(row + column, mask=column < pages, other=0)
        tl.store(indices_ptr + before + column, page, mask=column < pages)


def compact_pages(
    page_table_BP: Tensor,
    cache_seqlens_B: Tensor,
    page_size: int,
    indptr_B1: Tensor,
    indices: Tensor,
    last_page_len_B: Tensor,
) -> None:
    """All int32. ``indices`` [at least all pages] gets the pages of request b at ``indptr_B1[b]`` to
    ``indptr_B1[b + 1]``, ``last_page_len_B`` the tokens in each request's last page; what is behind the last page in
    ``indices`` stays as it was."""
    batch_size, width = page_table_BP.shape
    wanted = max(1, triton.cdiv(width, _BLOCK_P))
    programs = min(wanted, max(1, _PROGRAMS // batch_size))
    _compact_pages_kernel[(batch_size * programs,)](
        page_table_BP,
        cache_seqlens_B,
        indptr_B1,
        indices,
        last_page_len_B,
        page_table_BP.stride(0),
        programs,
        PAGE_SIZE=page_size,
        BLOCK_B=_BLOCK_B,
        BLOCK_P=_BLOCK_P,
    )
