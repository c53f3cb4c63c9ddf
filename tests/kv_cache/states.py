"""Everything that an operation of the cache may change, as one comparable value."""

from __future__ import annotations

from typing import Any

from fa_research.kv_cache import PagedAllocator, PagedKVCache


def allocator_state(allocator: PagedAllocator) -> tuple[Any, ...]:
    counts = [allocator.references(page) for page in range(allocator.num_pages + 1)]
    return sorted(allocator.free_pages()), counts


def cache_state(cache: PagedKVCache) -> tuple[Any, ...]:
    """The table on the device is part of it."""
    requests = {r.row: (r.seq_len, list(r.pages)) for r in cache.requests}
    table = cache.req_to_token.req_to_token.tolist()
    kept = cache.prefix_cache and sorted(cache.prefix_cache.held_pages())
    return allocator_state(cache.allocator), cache.req_to_token.rows_free, requests, table, kept
