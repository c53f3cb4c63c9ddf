"""Requests in the cache under long random service: rows, pages, table and contents stay in step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fa_research.errors import ConfigError, KVCacheFull
from fa_research.kv_cache import CachedRequest
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
