"""Caches as service leaves them, and decode batches as the engine makes them. `tests.helpers` has these names too.

Legend: B requests, R rows, W slots.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.kernels import ops
from fa_research.kv_cache import CachedRequest, PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool


def make_cache(
    num_pages: int,
    page_size: int,
    *,
    max_requests: int = 8,
    max_context_len: int = 64,
    num_layers: int = 1,
    kv_heads: int = 1,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    check_invariants: bool = True,
) -> PagedKVCache:
    """The three pools as one cache. Invariants are checked after every operation."""
    table = ReqToTokenPool(max_requests, max_context_len, page_size=page_size, device=device)
    shape = {"num_kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": head_dim}
    kv = TokenToKVPool(num_pages, page_size, num_layers=num_layers, **shape, dtype=dtype, device=device)
    return PagedKVCache(table, PagedAllocator(num_pages, page_size), kv, check_invariants=check_invariants)


def age(cache: PagedKVCache, seed: int) -> None:
    """Leave rows, pages and stale table entries as service leaves them: opened, grown in turns, closed in any order."""
    rng = random.Random(seed)
    cache.allocator.churn(seed)
    requests = [cache.open() for _ in range(min(cache.req_to_token.rows_free, cache.allocator.pages_free))]
    cache.extend(requests, [1] * len(requests))
    longest = max(1, min(cache.req_to_token.max_context_len, cache.allocator.pages_free * cache.page_size))
    cache.extend(requests[:1], [longest - 1])
    for request in rng.sample(requests, len(requests)):
        cache.close(request)
    cache.allocator.churn(seed + 1)


def slots_of(cache: PagedKVCache, request: CachedRequest, seq_len: int | None = None) -> list[int]:
    """The slots of a request's tokens, from its pages and not from the table."""
    seq_len = request.seq_len if seq_len is None else seq_len
    size = cache.page_size
    return [request.pages[j // size] * size + j % size for j in range(seq_len)]


def table_row(cache: PagedKVCache, request: CachedRequest) -> list[int]:
    """The slots of a request's tokens, from the table on the device."""
    row: list[int] = cache.req_to_token.req_to_token[request.row, : request.seq_len].tolist()
    return row


def decode_batch(
    req_to_token_RW: Tensor, rows: Sequence[int], seq_lens: Sequence[int], bound: int
) -> ForwardBatch:
    """The step after `seq_lens` tokens, as a captured step makes it: the device advances, and the host knows only that
    no length passes `bound`. Row 0 is padding."""
    device = req_to_token_RW.device
    rows_B = torch.tensor(rows, dtype=torch.int32, device=device)
    seq_lens_B = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    positions_B, loc_B = (torch.full((len(rows),), -1, dtype=torch.int64, device=device) for _ in range(2))
    ops.advance_decode(req_to_token_RW, rows_B, seq_lens_B, positions_B, loc_B)
    return ForwardBatch(
        mode=ForwardMode.DECODE,
        input_ids_T=torch.zeros_like(positions_B),
        positions_T=positions_B,
        req_pool_indices_B=rows_B,
        seq_lens_B=seq_lens_B,
        out_cache_loc_T=loc_B,
        max_seq_len_q=1,
        max_seq_len_k=bound,
    )


def examples(count: int, **more: Any) -> settings:
    """Settings of a property test: so many examples, however slow the machine is."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow], **more)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, a call that makes the host wait for the GPU raises. Without a GPU it does nothing."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tokens(lens: Sequence[int]) -> list[list[int]]:
    return [[1] * n for n in lens]
