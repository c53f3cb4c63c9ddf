"""The two-level KV cache: request -> token slots (`ReqToTokenPool`) -> keys and values (`TokenToKVPool`)."""

from __future__ import annotations

from fa_research.kv_cache.allocator import PagedAllocator
from fa_research.kv_cache.cache import CachedRequest, PagedKVCache, PageOwner
from fa_research.kv_cache.pool import TokenToKVPool
from fa_research.kv_cache.prefix_cache import PrefixCache
from fa_research.kv_cache.req_to_token import ReqToTokenPool

__all__ = [
    "CachedRequest",
    "PageOwner",
    "PagedAllocator",
    "PagedKVCache",
    "PrefixCache",
    "ReqToTokenPool",
    "TokenToKVPool",
]
