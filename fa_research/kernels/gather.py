"""Keys and values out of their pages: the Triton kernel for CUDA tensors, plain torch for the rest.

Shapes as in gather_kv.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """K and V of each request's tokens out of their pages: token j of request b to ``starts[b] + j``, then `tail` rows
    of zeros; the sink page reads as zeros."""
    if k_cache_NKD.is_cuda:
        from fa_research.kernels import gather_kv as kernel

        kernel.gather_kv(
            k_cache_NKD, v_cache_NKV, page_table_BP, cache_seqlens_B, starts_B1, page_size, k_out_GKD, v_out_GKV, tail
        )  # fmt: skip
        return
    starts = starts_B1.tolist()
    for row, (start, length) in enumerate(zip(starts[:-1], cache_seqlens_B.tolist(), strict=True)):
        token_G = torch.arange(length, device=page_table_BP.device)
        page_G = page_table_BP[row, token_G // page_size].long()
        for source, out in ((k_cache_NKD, k_out_GKD), (v_cache_NKV, v_out_GKV)):
            found = source[page_G * page_size + token_G % page_size]
            out[start : start + length] = torch.where(page_G[:, None, None] != 0, found, 0)
    for out in (k_out_GKD, v_out_GKV):
        out[starts[-1] : starts[-1] + tail] = 0
