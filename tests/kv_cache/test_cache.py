"""Opening, growing, forking and closing requests: limits, sharing, and what misuse meets."""

from __future__ import annotations

import pytest
import torch

from fa_research.errors import CacheError, ConfigError, KVCacheFull
from fa_research.kv_cache import CachedRequest, PagedKVCache
from tests.helpers import make_cache, slots_of, table_row
from tests.kv_cache.states import cache_state


@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
def test_the_context_limit_is_exact(page_size: int) -> None:
    cache = make_cache(40, page_size, max_context_len=37)
    request = cache.open()
    cache.extend([request], [37])
    assert len(set(table_row(cache, request))) == 37
    before = cache_state(cache)
    with pytest.raises(
        ConfigError, match=r"a request of 38 tokens passes the context limit of 37 tokens.*max_context_len"
    ):
        cache.extend([request], [1])
    assert cache_state(cache) == before


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_the_pool_fills_to_the_last_slot(page_size: int) -> None:
    """Every page is used, and one token more is refused whichever request asks."""
    cache = make_cache(6, page_size, max_context_len=6 * page_size)
    a, b = cache.open(), cache.open()
    cache.extend([a, b], [4 * page_size, 2 * page_size])
    slots = table_row(cache, a) + table_row(cache, b)
    assert sorted(slots) == list(range(page_size, 7 * page_size))
    for request in (a, b):
        before = cache_state(cache)
        with pytest.raises(KVCacheFull):
            cache.extend([request], [1])
        assert cache_state(cache) == before


def test_a_batch_is_admitted_whole_or_not_at_all() -> None:
    """The first of the two would fit alone."""
    cache = make_cache(4, 4, max_context_len=64)
    a, b = cache.open(), cache.open()
    before = cache_state(cache)
    with pytest.raises(KVCacheFull, match="5 pages requested, 4 pages free"):
        cache.extend([a, b], [8, 12])
    assert cache_state(cache) == before


def test_a_fork_outlives_its_parent_and_the_reverse() -> None:
    cache = make_cache(8, 4)
    parent = cache.open()
    cache.extend([parent], [10])
    child = cache.fork(parent, 9)
    assert child.seq_len == 8 and child.pages == parent.pages[:2]
    grandchild = cache.fork(child, 8)
    cache.extend([child], [1])
    assert child.pages[2] not in parent.pages, "the third page was only partly the prefix: it is not shared"
    shared = list(parent.pages[:2])
    cache.close(parent)
    cache.close(child)
    assert list(grandchild.pages) == shared and table_row(cache, grandchild) == slots_of(cache, grandchild)
    assert cache.allocator.pages_used == 2
    cache.close(grandchild)
    assert cache.allocator.pages_free == 8


def test_a_fork_without_a_free_row_changes_nothing() -> None:
    cache = make_cache(8, 4, max_requests=1)
    parent = cache.open()
    cache.extend([parent], [8])
    before = cache_state(cache)
    with pytest.raises(ConfigError, match=r"kv\.max_requests=1"):
        cache.fork(parent, 8)
    assert cache_state(cache) == before


def test_a_stale_handle_does_not_close_the_next_tenant_of_its_row() -> None:
    cache = make_cache(8, 4)
    old = cache.open()
    cache.close(old)
    new = cache.open()
    assert new.row == old.row
    cache.extend([new], [3])
    with pytest.raises(CacheError, match="not open"):
        cache.close(old)
    assert cache.requests == {new} and new.pages


def test_reserved_pages_are_used_before_new_ones() -> None:
    cache = make_cache(4, 4, max_context_len=16)
    request = cache.open()
    cache.reserve([request], [9])
    assert request.seq_len == 0 and cache.allocator.pages_free == 1
    cache.extend([request], [12])
    assert cache.allocator.pages_free == 1


def test_two_thousand_steps_of_service_leak_nothing() -> None:
    """SGLang's retraction soak in small: requests come, decode, and are thrown out when the cache is full."""
    cache = make_cache(24, 4, max_requests=6, max_context_len=64)
    live: list[CachedRequest] = []
    refused = 0
    for step in range(2000):
        if step % 5 == 0 and cache.req_to_token.rows_free:
            live.append(cache.open())
        try:
            cache.extend(live, [1 if request.seq_len else 5 for request in live])
        except KVCacheFull:
            refused += 1
            cache.close(live.pop())
        for request in [r for r in live if r.seq_len > 40]:
            live.remove(request)
            cache.close(request)
    assert refused > 50
    for request in live:
        cache.close(request)
    assert cache.allocator.pages_free == 24 and cache.req_to_token.rows_free == 6


def poisoned_pages(cache: PagedKVCache) -> set[int]:
    nan = cache.kv.k_paged(0).isnan().flatten(1)
    assert torch.equal(nan.any(1), nan.all(1))
    return set(nan.all(1).nonzero().flatten().tolist())


def test_with_poison_exactly_the_pages_that_nobody_holds_are_nan() -> None:
    """Pages are cleared when handed out, keep what they hold as their request grows, and turn to NaN with their last
    owner."""
    plain = make_cache(8, 4)
    cache = PagedKVCache(plain.req_to_token, plain.allocator, plain.kv, poison=True)
    assert poisoned_pages(cache) == set(range(9))
    parent = cache.open()
    cache.extend([parent], [9])
    assert poisoned_pages(cache) == set(range(9)) - set(parent.pages)
    cache.kv.k(0)[table_row(cache, parent)] = 5.0
    cache.extend([parent], [5])
    assert cache.kv.k(0)[table_row(cache, parent)[:9]].eq(5.0).all()
    child = cache.fork(parent, 8)
    cache.close(parent)
    assert poisoned_pages(cache) == set(range(9)) - set(child.pages)
    assert cache.kv.k(0)[table_row(cache, child)].eq(5.0).all()
    cache.close(child)
    assert poisoned_pages(cache) == set(range(9))


def damaged(cache: PagedKVCache, request: CachedRequest, damage: str) -> None:
    if damage == "lost page":
        request.pages.pop()
    elif damage == "page twice":
        request.pages.append(request.pages[0])
    elif damage == "length":
        request.seq_len = 100
    else:
        cache.allocator.share(request.pages[:1])


@pytest.mark.parametrize("damage", ["lost page", "page twice", "length", "count"])
def test_check_sees_each_kind_of_damage(damage: str) -> None:
    cache = make_cache(8, 4)
    request = cache.open()
    cache.extend([request], [9])
    cache.check()
    damaged(cache, request, damage)
    with pytest.raises(AssertionError):
        cache.check()
