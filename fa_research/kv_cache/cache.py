"""Requests in the cache: rows, pages and the table, kept in step. The engine talks to this class alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fa_research.errors import ConfigError
from fa_research.kv_cache.allocator import PagedAllocator
from fa_research.kv_cache.pool import TokenToKVPool
from fa_research.kv_cache.req_to_token import ReqToTokenPool


@dataclass(slots=True, eq=False)
class CachedRequest:
    """One request's place: its row in `req_to_token`, its pages in order, and how many tokens are in the
    cache."""

    row: int
    seq_len: int = 0
    pages: list[int] = field(default_factory=list)


class PagedKVCache:
    """Opens, grows, forks and closes requests. Growth is all or nothing: KVCacheFull changes nothing.

    check_invariants: verify the whole bookkeeping after every operation (`debug.check_invariants`). poison:
    NaN in the sink page and in every free page; a page is cleared when it is handed out (`debug.poison`).
    What lies past a request's end in its own last page stays finite, as the pool promises to the kernels."""

    def __init__(
        self,
        req_to_token: ReqToTokenPool,
        allocator: PagedAllocator,
        kv: TokenToKVPool,
        *,
        check_invariants: bool = False,
        poison: bool = False,
    ) -> None:
        assert req_to_token.page_size == allocator.page_size == kv.page_size
        self.req_to_token = req_to_token
        self.allocator = allocator
        self.kv = kv
        self.page_size = allocator.page_size
        self.requests: dict[int, CachedRequest] = {}
        self._check_invariants = check_invariants
        self._poison = poison
        if poison:
            kv.poison()

    def open(self) -> CachedRequest:
        """A new request without tokens."""
        request = CachedRequest(self.req_to_token.alloc())
        self.requests[request.row] = request
        return request

    def reserve(self, requests: Sequence[CachedRequest], seq_lens: Sequence[int]) -> None:
        """Make sure that each request has slots for `seq_lens` tokens in all. Raises KVCacheFull or
        ConfigError (past the context limit), and then nothing has changed."""
        self._check_limit(seq_lens)
        capacities = [len(request.pages) * self.page_size for request in requests]
        counts = [
            self.allocator.pages_for(capacity, max(capacity, seq_len))
            for capacity, seq_len in zip(capacities, seq_lens, strict=True)
        ]
        pages = self.allocator.alloc(sum(counts))
        rows: list[int] = []
        indices: list[int] = []
        taken = 0
        for request, count in zip(requests, counts, strict=True):
            rows += [request.row] * count
            indices += range(len(request.pages), len(request.pages) + count)
            request.pages += pages[taken : taken + count]
            taken += count
        self.req_to_token.write_pages(rows, indices, pages)
        if self._poison and pages:
            self.kv.clear(pages)
        self._after()

    def extend(self, requests: Sequence[CachedRequest], new_lens: Sequence[int]) -> None:
        """Grow each request by `new_lens` tokens; the forward pass that follows writes them."""
        seq_lens = [request.seq_len + new for request, new in zip(requests, new_lens, strict=True)]
        self.reserve(requests, seq_lens)
        for request, seq_len in zip(requests, seq_lens, strict=True):
            request.seq_len = seq_len

    def fork(self, parent: CachedRequest, prefix_len: int) -> CachedRequest:
        """A new request that shares the parent's first tokens. Only full pages are shared, because a shared
        page is never written: the fork starts at `prefix_len` rounded down to whole pages."""
        assert prefix_len <= parent.seq_len
        count = prefix_len // self.page_size
        child = self.open()
        child.pages = parent.pages[:count]
        child.seq_len = count * self.page_size
        self.allocator.share(child.pages)
        self.req_to_token.write_pages([child.row] * count, list(range(count)), child.pages)
        self._after()
        return child

    def close(self, request: CachedRequest) -> None:
        """Give back the request's row and its pages (those that no other request shares become free)."""
        assert self.requests.get(request.row) is request, (
            f"the request is not open, row {request.row} is another's or free"
        )
        del self.requests[request.row]
        freed = self.allocator.free(request.pages)
        if self._poison and freed:
            self.kv.poison(freed)
        self.req_to_token.free(request.row)
        request.pages = []
        self._after()

    def check(self) -> None:
        """free + used = total, and every page is held by exactly as many requests as it counts. Host only."""
        self.allocator.check()
        held = Counter(page for request in self.requests.values() for page in request.pages)
        assert len(held) == self.allocator.pages_used, "pages are used that no request holds"
        for page, count in held.items():
            assert self.allocator.references(page) == count, f"page {page} is held {count} times"
        for request in self.requests.values():
            assert len(set(request.pages)) == len(request.pages), f"row {request.row} holds a page twice"
            assert request.seq_len <= len(request.pages) * self.page_size

    def _check_limit(self, seq_lens: Sequence[int]) -> None:
        limit = self.req_to_token.max_context_len
        if seq_lens and max(seq_lens) > limit:
            raise ConfigError(
                f"a request of {max(seq_lens)} tokens passes the context limit of {limit} tokens; "
                f"shorten the workload's context, prompt or steps, or raise model.max_context_len"
            )

    def _after(self) -> None:
        if self._check_invariants:
            self.check()
