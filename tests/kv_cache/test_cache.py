"""Requests in the cache under long random service: rows, pages, table and contents stay in step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fa_research.errors import ConfigError, KVCacheFull
from fa_research.kv_cache import CachedRequest, PagedKVCache
from tests.helpers import age, examples, make_cache, slots_of, table_row
from tests.kv_cache.states import cache_state

LIMIT = 22  # tokens of a request; no multiple of the page sizes below but 1


class Service(RuleBasedStateMachine):
    """A model of the cache: `texts` says what each request's tokens are, as numbers that the pool must give back. Pages
    are filled with NaN as they become free, so that a request that still reads one shows it."""

    @initialize(page_size=st.sampled_from([1, 3, 4, 16]), pages=st.integers(2, 14), seed=st.integers(0, 99))
    def start(self, page_size: int, pages: int, seed: int) -> None:
        self.cache = make_cache(pages, page_size, max_requests=4, max_context_len=LIMIT)
        age(self.cache, seed)
        self.cache.kv.poison()
        self.texts: dict[CachedRequest, list[int]] = {}
        self.written = 0

    @rule()
    def open(self) -> None:
        if len(self.texts) < 4:
            self.texts[self.cache.open()] = []
            return
        before = cache_state(self.cache)
        with pytest.raises(ConfigError, match=r"kv\.max_requests=4"):
            self.cache.open()
        assert cache_state(self.cache) == before

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(list(self.texts)), unique=True, min_size=1))
        new = data.draw(st.lists(st.integers(0, 12), min_size=len(some), max_size=len(some)))
        seq_lens = [len(self.texts[r]) + n for r, n in zip(some, new, strict=True)]
        if self._admits(some, seq_lens, lambda: self.cache.extend(some, new)):
            for request, count in zip(some, new, strict=True):
                self._write(request, count)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        """Room ahead of the tokens: it changes no length."""
        request = data.draw(st.sampled_from(list(self.texts)))
        seq_len = len(self.texts[request]) + data.draw(st.integers(0, 12))
        self._admits([request], [seq_len], lambda: self.cache.reserve([request], [seq_len]))

    @precondition(lambda self: 0 < len(self.texts) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(list(self.texts)))
        prefix = data.draw(st.integers(0, len(self.texts[parent])))
        free = self.cache.allocator.pages_free
        child = self.cache.fork(parent, prefix)
        whole = prefix // self.cache.page_size * self.cache.page_size
        assert child.seq_len == whole and child.row != parent.row
        assert self.cache.allocator.pages_free == free, "sharing takes no page"
        self.texts[child] = self.texts[parent][:whole]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.texts)))
        pages = list(request.pages)
        self.cache.close(request)
        del self.texts[request]
        for page in pages:
            if not self.cache.allocator.references(page):
                self.cache.kv.k_paged(0)[page] = torch.nan

    @rule(seed=st.integers(0, 99))
    def churn(self, seed: int) -> None:
        self.cache.allocator.churn(seed)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check()
        allocator = self.cache.allocator
        assert allocator.pages_free + allocator.pages_used == allocator.num_pages
        assert self.cache.req_to_token.rows_free == 4 - len(self.texts)
        held = {page for request in self.texts for page in request.pages}
        assert allocator.pages_used == len(held)

    @invariant()
    def each_request_reads_what_it_wrote(self) -> None:
        for request, text in self.texts.items():
            assert request.seq_len == len(text)
            slots = table_row(self.cache, request)
            assert slots == slots_of(self.cache, request)
            assert self.cache.kv.k(0)[slots, 0, 0].tolist() == text

    @invariant()
    def no_slot_is_in_two_rows_but_for_a_common_beginning(self) -> None:
        texts = list(self.texts.items())
        for i, (a, a_text) in enumerate(texts):
            for b, b_text in texts[i + 1 :]:
                shared = set(a.pages) & set(b.pages)
                count = len(shared)
                assert a.pages[:count] == b.pages[:count] and set(a.pages[:count]) == shared
                tokens = count * self.cache.page_size
                assert a_text[:tokens] == b_text[:tokens] and len(a_text) >= tokens <= len(b_text)

    @invariant()
    def row_0_points_at_page_0(self) -> None:
        assert self.cache.req_to_token.req_to_token[0].eq(0).all()

    def _admits(self, requests: list[CachedRequest], seq_lens: list[int], grow) -> bool:  # type: ignore[no-untyped-def]
        """Run `grow`, which must raise and change nothing exactly where the lengths do not fit."""
        size, before = self.cache.page_size, cache_state(self.cache)
        missing = [max(0, -(-n // size) - len(r.pages)) for r, n in zip(requests, seq_lens, strict=True)]
        free = self.cache.allocator.pages_free
        if max(seq_lens) > LIMIT:
            with pytest.raises(ConfigError, match=f"passes the context limit of {LIMIT} tokens"):
                grow()
        elif sum(missing) > free:
            with pytest.raises(KVCacheFull) as error:
                grow()
            assert (error.value.requested, error.value.free) == (sum(missing), free)
        else:
            grow()
            assert self.cache.allocator.pages_free == free - sum(missing)
            return True
        assert cache_state(self.cache) == before
        return False

    def _write(self, request: CachedRequest, count: int) -> None:
        """What the forward pass would do with the new slots."""
        numbers = list(range(self.written, self.written + count))
        slots = torch.tensor(table_row(self.cache, request)[request.seq_len - count :], dtype=torch.int64)
        values = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 8)
        self.cache.kv.write(0, values, values, slots)
        self.texts[request] += numbers
        self.written += count


TestService = Service.TestCase
TestService.settings = examples(120, stateful_step_count=40)


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
    assert grandchild.pages == shared and table_row(cache, grandchild) == slots_of(cache, grandchild)
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
    with pytest.raises(AssertionError, match="not open"):
        cache.close(old)
    assert cache.requests == {new.row: new} and new.pages


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
