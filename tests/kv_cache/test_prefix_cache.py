"""What went wrong with prefix caches in other engines, each as the test that would have caught it."""

from __future__ import annotations

import pytest
import torch

from fa_research.errors import CacheError, KVCacheFull
from fa_research.kv_cache import CachedRequest, PagedAllocator, PagedKVCache, PrefixCache
from tests.helpers import make_cache, table_row

PAGE_SIZES = pytest.mark.parametrize("size", [1, 16])


def cache_with_prefixes(pages: int, size: int) -> tuple[PagedKVCache, PrefixCache]:
    plain = make_cache(pages, size, max_context_len=pages * size)
    prefixes = PrefixCache(plain.allocator)
    cache = PagedKVCache(
        plain.req_to_token,
        plain.allocator,
        plain.kv,
        prefix_cache=prefixes,
        poison=True,
        check_invariants=True,
    )
    return cache, prefixes


def admit(cache: PagedKVCache, prompt: list[int]) -> CachedRequest:
    """A request that takes what is known of its prompt and computes the rest; a token's key is its id."""
    assert cache.prefix_cache is not None
    request = cache.open(cache.prefix_cache.match(prompt))
    known = request.seq_len
    try:
        cache.extend([request], [len(prompt) - known])
    except KVCacheFull:
        cache.close(request)
        raise
    cache.kv.k(0)[table_row(cache, request)[known:]] = torch.tensor(prompt[known:]).float().view(-1, 1, 1)
    return request


def keys(cache: PagedKVCache, request: CachedRequest) -> list[float]:
    values: list[float] = cache.kv.k(0)[table_row(cache, request), 0, 0].tolist()
    return values


def test_a_fork_cannot_be_written_through_its_parent() -> None:
    """A request that shrinks into a shared page would write it: refused, and seen by `check` where it is done by
    hand. The page is the parent's partly filled last one then."""
    cache, _ = cache_with_prefixes(8, 4)
    parent = cache.open()
    cache.extend([parent], [8])
    cache.fork(parent, 8)
    with pytest.raises(CacheError, match="keep at least 8 tokens"):
        cache.shrink([parent], [6])
    with pytest.raises(CacheError, match="extend by -2 tokens: must be at least 0"):
        cache.extend([parent], [-2])
    assert parent.seq_len == 8
    parent.seq_len = 6
    with pytest.raises(AssertionError, match=r"has 2 owners and may be written"):
        cache.check()


@PAGE_SIZES
def test_two_live_requests_with_one_prefix(size: int) -> None:
    """known failure: prefix cache remapped two live identical prefixes (mini-sglang #142). Each computed its own."""
    cache, _ = cache_with_prefixes(8, size)
    prompt = list(range(1, 2 * size + 1))
    first, second = admit(cache, prompt), admit(cache, prompt)
    pages = list(second.pages)
    cache.insert(first, prompt)
    cache.insert(second, prompt)
    assert list(second.pages) == pages and not set(first.pages) & set(pages)
    cache.close(first, prompt)
    cache.evict(8)
    assert keys(cache, second) == prompt


@PAGE_SIZES
def test_shared_pages_are_counted_once(size: int) -> None:
    """known failure: shared pages counted twice as evictable (SGLang #35270)."""
    cache, prefixes = cache_with_prefixes(8, size)
    prompt = list(range(3 * size))
    cache.close(admit(cache, prompt), prompt)
    live = [admit(cache, [*prompt, n]) for n in (1, 2)]
    assert cache.evict(8) == 0 and len(list(prefixes.held_pages())) == 3
    for request in live:
        cache.close(request)
    assert cache.evict(8) == 3 and cache.allocator.pages_free == 8


def test_a_prompt_shorter_than_a_page() -> None:
    """known failure: a key shorter than a page, sizes taken by the key (SGLang #10637)."""
    cache, prefixes = cache_with_prefixes(4, 16)
    cache.close(admit(cache, [1] * 15), [1] * 15)
    assert not prefixes.match([1] * 15) and cache.allocator.pages_free == 4
    cache.close(admit(cache, [1] * 17), [1] * 17)
    assert len(list(prefixes.held_pages())) == 1 and not prefixes.match([1] * 15)


@PAGE_SIZES
def test_a_matched_prefix_is_not_evicted(size: int) -> None:
    """known failure: the lock skipped the matched node, which was evicted (mini-sglang #52)."""
    cache, prefixes = cache_with_prefixes(6, size)
    prompt = list(range(2 * size))
    cache.close(admit(cache, prompt), prompt)
    hit = admit(cache, [*prompt, 7])
    other = cache.open()
    with pytest.raises(KVCacheFull):
        cache.extend([other], [4 * size])
    cache.extend([other], [3 * size])
    assert keys(cache, hit) == [*prompt, 7]
    stale = prefixes.match([*prompt, 7])
    cache.close(hit)
    cache.evict(6)
    with pytest.raises(CacheError, match="evicted after it had been matched"):
        cache.open(stale)


@PAGE_SIZES
def test_an_admission_that_fails_leaves_no_hit(size: int) -> None:
    """known failure: hit count kept from an admission that failed (vLLM #18957)."""
    cache, prefixes = cache_with_prefixes(6, size)
    prompt = list(range(2 * size))
    cache.close(admit(cache, prompt), prompt)
    blocker = cache.open()
    cache.extend([blocker], [3 * size])
    long = [*prompt, *range(2 * size)]
    with pytest.raises(KVCacheFull):
        admit(cache, long)
    cache.evict(6)
    cache.close(blocker)
    again = admit(cache, long)
    assert keys(cache, again) == long and not prefixes.match(long)


@PAGE_SIZES
def test_a_prompt_that_is_cached_whole_leaves_a_token_to_compute(size: int) -> None:
    """known failure: a prompt of exactly k pages gives zero queries (nano-vllm #144)."""
    cache, prefixes = cache_with_prefixes(6, size)
    prompt = list(range(3 * size))
    cache.close(admit(cache, prompt), prompt)
    assert len(prefixes.match(prompt)) == 2 and len(prefixes.match([*prompt, 1])) == 3
    assert keys(cache, admit(cache, prompt)) == prompt


@PAGE_SIZES
def test_a_retracted_request_takes_the_length_of_what_is_still_there(size: int) -> None:
    """known failure: a hit after preemption used an old length (nano-vllm #211, #233)."""
    cache, _ = cache_with_prefixes(5, size)
    tokens = list(range(4 * size))
    cache.close(admit(cache, tokens), tokens)
    cache.evict(2)
    again = cache.open(cache.prefix_cache.match([*tokens, 1]) if cache.prefix_cache else ())
    assert again.seq_len == 2 * size and keys(cache, again) == tokens[: 2 * size]


def test_the_least_recently_used_leaf_goes_first_from_its_tail() -> None:
    cache, prefixes = cache_with_prefixes(8, 1)
    for prompt in ([1, 2, 3], [4, 5], [1, 2]):
        cache.close(admit(cache, prompt), prompt)
    cache.evict(1)
    assert len(prefixes.match([1, 2, 3, 9])) == 2, "[1, 2] was used later than its end [3]"
    cache.evict(1)
    assert len(prefixes.match([4, 5, 9])) == 1
    cache.evict(2)
    assert len(prefixes.match([4, 9])) == 0 and len(prefixes.match([1, 2, 9])) == 1


def test_salts_keep_equal_tokens_apart() -> None:
    cache, prefixes = cache_with_prefixes(8, 4)
    prompt = list(range(8))
    cache.close(admit(cache, prompt), prompt, salt="tenant")
    assert not prefixes.match([*prompt, 1]) and len(prefixes.match([*prompt, 1], "tenant")) == 2


def tree(pages: int, *prompts: list[int]) -> tuple[PagedAllocator, PrefixCache]:
    """The prompts, a page a token, inserted one after another; only the tree owns their pages."""
    allocator = PagedAllocator(pages, 1)
    prefixes = PrefixCache(allocator)
    for prompt in prompts:
        own = allocator.alloc(len(prompt))
        prefixes.insert(prompt, own)
        allocator.free(own)
    return allocator, prefixes


def test_what_is_inserted_again_is_used_again() -> None:
    _, prefixes = tree(16, [1, 2], [3, 4], [1, 2])
    prefixes.evict(2)
    assert len(prefixes.match([1, 2, 9])) == 2 and not len(prefixes.match([3, 4, 9]))


def test_all_or_nothing_gives_up_nothing_where_too_little_can_be_freed() -> None:
    allocator, prefixes = tree(8, [1, 2, 3])
    free = allocator.pages_free
    assert not len(prefixes.evict(4, all_or_nothing=True)) and allocator.pages_free == free
    assert len(prefixes.match([1, 2, 3, 9])) == 3
    assert len(prefixes.evict(4)) == 3


def test_a_run_whose_branches_are_gone_can_be_evicted() -> None:
    allocator, prefixes = tree(16, [1, 2, 3], [1, 2, 4])
    prefixes.evict(1)
    prefixes.evict(1)
    assert len(prefixes.match([1, 2, 9])) == 2
    assert len(prefixes.evict(9)) == 2 and allocator.pages_free == 16
    prefixes.check()
