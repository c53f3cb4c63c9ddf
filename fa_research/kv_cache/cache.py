"""Requests in the cache: rows, pages and the table, kept in step. The engine talks to this class alone."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fa_research.errors import CacheError, ConfigError
from fa_research.kv_cache.allocator import PagedAllocator, Pages
from fa_research.kv_cache.pool import TokenToKVPool
from fa_research.kv_cache.prefix_cache import PrefixCache, Tokens
from fa_research.kv_cache.req_to_token import ReqToTokenPool


class PageOwner(Protocol):
    """Who holds pages. The allocator counts a page once for each owner."""

    def held_pages(self) -> Iterable[int]:
        """Every page that it owns, once."""
        ...

    def writable_pages(self) -> Iterable[int]:
        """Those of them that it may still write; no one else may own these."""
        ...


@dataclass(slots=True, eq=False)
class CachedRequest:
    """One request's place: its row in `req_to_token`, its pages in order, and how many tokens are in the cache. It owns
    its pages."""

    row: int
    page_size: int
    seq_len: int = 0
    pages: Pages = field(default_factory=lambda: array("q"))

    def held_pages(self) -> Sequence[int]:
        """Every page, also those that are reserved and hold no token yet."""
        return self.pages

    def writable_pages(self) -> Sequence[int]:
        """The partly filled last page, and those behind it."""
        return self.pages[self.seq_len // self.page_size :]


class PagedKVCache:
    """Opens, grows, shrinks, forks and closes requests. Each operation does all of what it was asked or raises and
    changes nothing: KVCacheFull, ConfigError (the context limit, no free row), or CacheError for a call that makes no
    sense, such as one with a request that is closed or named twice.

    prefix_cache: keeps the pages of closed requests for later ones with the same prefix, until they are needed
    (None: pages are freed with their last request). check_invariants: verify the whole bookkeeping after every
    operation (`debug.check_invariants`). poison: NaN in the null page and in every free page; a page is cleared when it
    is handed out (`debug.poison`). What lies past a request's end in its own last page stays finite, as the pool
    promises to the kernels."""

    def __init__(
        self,
        req_to_token: ReqToTokenPool,
        allocator: PagedAllocator,
        kv: TokenToKVPool,
        *,
        prefix_cache: PrefixCache | None = None,
        check_invariants: bool = False,
        poison: bool = False,
    ) -> None:
        assert req_to_token.page_size == allocator.page_size == kv.page_size
        self.req_to_token = req_to_token
        self.allocator = allocator
        self.kv = kv
        self.page_size = allocator.page_size
        self.prefix_cache = prefix_cache
        self.requests: set[CachedRequest] = set()
        self._check_invariants = check_invariants
        self._poison = poison
        if poison:
            kv.poison()

    def owners(self) -> Iterator[PageOwner]:
        """All that hold pages: the requests that are open, and the prefix cache."""
        yield from self.requests
        if self.prefix_cache is not None:
            yield self.prefix_cache

    def open(self, prefix: Sequence[int] = ()) -> CachedRequest:
        """A new request. It begins with the tokens in the pages `prefix`, as `PrefixCache.match` returned them, which
        nothing can evict from then on."""
        seq_len = len(prefix) * self.page_size
        self._check_limit([seq_len])
        owners = self.allocator.references_of(prefix)
        if not owners.all():
            raise CacheError(
                f"open with a prefix in page {prefix[int(owners.argmin())]}, which is free: it was evicted after it "
                "had been matched; match again"
            )
        request = CachedRequest(self.req_to_token.alloc(), self.page_size, seq_len, array("q", prefix))
        self.requests.add(request)
        self.allocator.share(request.pages)
        self.req_to_token.write_pages([request.row], [0], [len(prefix)], request.pages)
        self._after()
        return request

    def reserve(self, requests: Sequence[CachedRequest], seq_lens: Sequence[int]) -> None:
        """Make sure that each request has slots for `seq_lens` tokens in all, evicting cached prefixes where too few
        pages are free. Raises KVCacheFull, ConfigError (past the context limit) or CacheError."""
        self._check_open(requests)
        self._check_limit(seq_lens)
        size = self.page_size
        growing: list[tuple[CachedRequest, int, int]] = []
        for request, seq_len in zip(requests, seq_lens, strict=True):
            held = len(request.pages)
            count = -(-seq_len // size) - held
            if count > 0:
                growing.append((request, held, count))
        if growing:
            counts = [count for _, _, count in growing]
            pages = self._take(sum(counts))
            taken = 0
            for request, _, count in growing:
                request.pages += pages[taken : taken + count]
                taken += count
            rows, firsts = [r.row for r, _, _ in growing], [held for _, held, _ in growing]
            self.req_to_token.write_pages(rows, firsts, counts, pages)
        self._after()

    def extend(self, requests: Sequence[CachedRequest], new_lens: Sequence[int]) -> None:
        """Grow each request by `new_lens` tokens; the forward pass that follows writes them. Raises as `reserve`."""
        if new_lens and min(new_lens) < 0:
            raise CacheError(
                f"extend by {min(new_lens)} tokens: must be at least 0; shrink makes a request shorter"
            )
        seq_lens = [request.seq_len + new for request, new in zip(requests, new_lens, strict=True)]
        self.reserve(requests, seq_lens)
        for request, seq_len in zip(requests, seq_lens, strict=True):
            request.seq_len = seq_len

    def shrink(self, requests: Sequence[CachedRequest], seq_lens: Sequence[int]) -> None:
        """Forget all tokens of each request but the first `seq_lens`; it keeps its pages, and writes them again.
        Raises CacheError for a request that is shorter already, or whose shortened end lies in a page with another
        owner, which would see what is written."""
        self._check_open(requests)
        for request, seq_len in zip(requests, seq_lens, strict=True):
            if not 0 <= seq_len <= request.seq_len:
                raise CacheError(
                    f"shrink of row {request.row} to {seq_len} tokens: must be from 0 to its {request.seq_len} tokens"
                )
            first, end = seq_len // self.page_size, -(-request.seq_len // self.page_size)
            shared = [n for n in range(first, end) if self.allocator.references(request.pages[n]) > 1]
            if shared:
                raise CacheError(
                    f"shrink of row {request.row} to {seq_len} tokens: page {request.pages[shared[-1]]} would be "
                    f"written and has other owners; keep at least {(shared[-1] + 1) * self.page_size} tokens"
                )
        for request, seq_len in zip(requests, seq_lens, strict=True):
            request.seq_len = seq_len
        self._after()

    def fork(self, parent: CachedRequest, prefix_len: int) -> CachedRequest:
        """A new request that shares the parent's first tokens. Only full pages are shared, because a shared
        page is never written: the fork starts at `prefix_len` rounded down to whole pages."""
        self._check_open([parent])
        if not 0 <= prefix_len <= parent.seq_len:
            raise CacheError(
                f"fork of row {parent.row} at {prefix_len} tokens: must be from 0 to its {parent.seq_len} tokens"
            )
        return self.open(parent.pages[: prefix_len // self.page_size])

    def insert(self, request: CachedRequest, tokens: Sequence[int] | Tokens, salt: Hashable = None) -> None:
        """Let others find the whole pages of a request whose first tokens are `tokens`. The forward pass that computes
        them has been launched. Raises CacheError where the request has fewer tokens."""
        self._check_open([request])
        self._insert(request, tokens, salt)
        self._after()

    def close(
        self, request: CachedRequest, tokens: Sequence[int] | Tokens | None = None, salt: Hashable = None
    ) -> None:
        """The one end of a request: finished, aborted or retracted. Its whole pages of `tokens`, its first ones, go to
        the prefix cache if there is one (None: nothing goes there); then its row and its pages are given back. Pages
        without another owner become free. Raises CacheError."""
        self._check_open([request])
        if tokens is not None:
            self._insert(request, tokens, salt)
        self.requests.remove(request)
        self._poison_freed(self.allocator.free(request.pages))
        self.req_to_token.free(request.row)
        request.pages = array("q")
        self._after()

    def evict(self, wanted: int) -> int:
        """Free up to `wanted` pages of the prefix cache, the least recently used first; returns how many."""
        freed = self.prefix_cache.evict(wanted) if self.prefix_cache is not None else ()
        self._poison_freed(freed)
        self._after()
        return len(freed)

    def forget_prefixes(self) -> None:
        """The prefix cache gives up every page, so that no request shares a page with it."""
        if self.prefix_cache is not None:
            self._poison_freed(self.prefix_cache.clear())
        self._after()

    def check(self) -> None:
        """Verify that free + used = total, that every page has exactly the owners that its count says, and that no page
        with more than one owner will be written. Host only."""
        self.allocator.check()
        held: Counter[int] = Counter()
        for owner in self.owners():
            pages = list(owner.held_pages())
            assert len(set(pages)) == len(pages), f"{owner} holds a page twice"
            held.update(pages)
        assert len(held) == self.allocator.pages_used, "pages are used that no one holds"
        for page, count in held.items():
            assert self.allocator.references(page) == count, f"page {page} is held {count} times"
        for owner in self.owners():
            for page in owner.writable_pages():
                assert held[page] == 1, f"page {page} has {held[page]} owners and may be written by {owner}"
        for request in self.requests:
            assert 0 <= request.seq_len <= len(request.pages) * self.page_size
        if self.prefix_cache is not None:
            self.prefix_cache.check()

    def _insert(self, request: CachedRequest, tokens: Sequence[int] | Tokens, salt: Hashable) -> None:
        if len(tokens) > request.seq_len:
            raise CacheError(
                f"insert of {len(tokens)} tokens of row {request.row}: it has {request.seq_len} tokens; "
                "give only those that are computed"
            )
        if self.prefix_cache is not None:
            self.prefix_cache.insert(tokens, request.pages, salt)

    def _take(self, count: int) -> Pages:
        """`count` pages, evicting cached prefixes where fewer are free. Raises KVCacheFull, evicting nothing."""
        short = count - self.allocator.pages_free
        if short > 0 and self.prefix_cache is not None:
            self._poison_freed(self.prefix_cache.evict(short, all_or_nothing=True))
        pages = self.allocator.alloc(count)
        if self._poison:
            self.kv.clear(pages)
        return pages

    def _poison_freed(self, pages: Sequence[int]) -> None:
        if self._poison and pages:
            self.kv.poison(pages)

    def _check_open(self, requests: Sequence[CachedRequest]) -> None:
        distinct = set(requests)
        if not distinct <= self.requests:
            rows = ", ".join(str(request.row) for request in requests if request not in self.requests)
            raise CacheError(f"a request is not open (its row was {rows}): it was closed; open a new one")
        if len(distinct) != len(requests):
            row = next(request.row for request in requests if requests.count(request) > 1)
            raise CacheError(f"the request of row {row} is named twice in one call; name each request once")

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
