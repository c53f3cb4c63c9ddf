"""A trace replayed through the paged cache: who is admitted, what grows, what is shared, what is given back.

The model of time: a request is prefilled in no time when it is admitted, then gains one token a step, and leaves when
its answer is complete. Requests wait in order of arrival; the next one is admitted as soon as there is a place
(`concurrency`) and as many free pages as it and all live requests will still need. So nobody is preempted, and the
queue is never empty before the end: a service at its limit, whose arrival times matter by their order alone. The replay
ends when the last request is admitted, before the service would run empty.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fa_research.kv_cache import CachedRequest, PagedKVCache, PrefixCache
from fa_research.kv_cache.allocator import Pages
from fa_research.kv_cache.prefix_cache import Tokens
from fa_research.workloads.traces import BLOCK_SIZE, TraceRequest


@dataclass(slots=True, eq=False)
class Replayed:
    """A request in the cache. `shared_len`: tokens at its beginning whose pages it took from the prefix cache;
    `tokens`: ids of all its tokens to the end of its answer (None: nothing of it is shared)."""

    trace: TraceRequest
    cached: CachedRequest
    shared_len: int
    tokens: Tokens | None

    @property
    def tokens_left(self) -> int:
        return self.trace.final_length - self.cached.seq_len


@dataclass(slots=True)
class ReplayCounts:
    """Sums over steps (`_steps`: token or slot times step) and over requests."""

    steps: int = 0
    live_steps: int = 0
    token_steps: int = 0  # tokens of live requests, shared ones counted for each
    slot_steps: int = 0  # slots of used pages, shared ones once; what is retained included
    empty_steps: int = 0  # those of them that hold no token
    memory_bound_steps: int = 0  # steps in which a request waited for pages, not for a place
    peak_live: int = 0
    peak_slots: int = 0
    peak_empty: int = 0  # when `peak_slots` were used
    admitted: int = 0
    never_fit: int = 0
    prompt_tokens: int = 0
    hits: int = 0  # requests with a prefix in the cache
    found_tokens: int = 0  # of prompts, in the cache according to the trace
    shared_tokens: int = 0  # of these, in whole pages


class TokenIds:
    """Token ids that agree with what a trace says of prompts: equal in equal blocks, and distinct everywhere else."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._next = -1

    def of(self, request: TraceRequest) -> Tokens:
        """Ids of the prompt and the answer, int64. Ids in a block follow from its number; all others are below 0."""
        numbers = [self._blocks.setdefault(block, len(self._blocks)) for block in request.blocks]
        known = np.array(numbers, np.int64)[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        rest = request.final_length - known.size
        self._next -= rest
        return np.concatenate([known.ravel(), np.arange(self._next + 1, self._next + 1 + rest)])


@dataclass(slots=True)
class Replay:
    """One replay. `live` are the requests that generate. With `prefix_sharing` the cache gets a `PrefixCache`: prompts
    enter it when they are admitted, whole requests when they finish, as in SGLang. Both are a use, which decides what
    is evicted first. Answers take room there and are never found, because the trace does not tell their tokens. At most
    `retained_pages` pages stay that no live request holds; what live requests hold does not count. SGLang has no such
    limit: it evicts where pages are needed. Requests of which the trace knows no whole block do not enter: nothing
    could match."""

    cache: PagedKVCache
    concurrency: int
    prefix_sharing: bool
    retained_pages: int
    live: list[Replayed] = field(default_factory=list)
    counts: ReplayCounts = field(default_factory=ReplayCounts)
    _token_ids: TokenIds = field(default_factory=TokenIds)
    _retained: int = 0  # pages of the prefix cache that no live request holds

    def __post_init__(self) -> None:
        if self.prefix_sharing:
            self.cache.prefix_cache = PrefixCache(self.cache.allocator)

    def run(self, requests: Sequence[TraceRequest]) -> None:
        """Replay all of them but those that no empty pool could hold, which are counted."""
        fitting = [r for r in requests if self._pages(r.final_length) <= self.cache.allocator.num_pages]
        self.counts.never_fit += len(requests) - len(fitting)
        queue = deque(fitting)
        tokens = self._tokens(queue[0]) if queue else None
        while True:
            while queue and len(self.live) < self.concurrency and self._admit(queue[0], tokens):
                queue.popleft()
                tokens = self._tokens(queue[0]) if queue else None
            if not queue:
                break
            self._advance()
        if self.live:
            self._count(1, grow=0)

    def _tokens(self, request: TraceRequest) -> Tokens | None:
        return self._token_ids.of(request) if self.prefix_sharing and request.blocks else None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def _pages_to_come(self) -> int:
        """What live requests will still ask for."""
        return sum(self._pages(r.trace.final_length) - len(r.cached.pages) for r in self.live)

    def _admit(self, request: TraceRequest, tokens: Tokens | None) -> bool:
        """Admit the request if its pages, to the end of its answer, are free. Where nobody is live any more, retained
        prefixes make room."""
        matched = self._match(request, tokens)
        # At least one token of the prompt is computed: the first of the answer follows from it.
        prefix = matched[: (request.input_length - 1) // self.cache.page_size]
        missing = self._pages(request.final_length) - len(prefix)
        missing -= self.cache.allocator.pages_free - self._pages_to_come()
        if missing > 0 and self.live:
            return False
        self._retained -= self._held_once(prefix)
        cached = self.cache.open(prefix)
        shared = cached.seq_len
        if missing > 0:
            self._retained -= self.cache.evict(missing)
        self.cache.extend([cached], [request.input_length - shared])
        if tokens is not None:
            self.cache.insert(cached, tokens[: request.input_length])
        self.live.append(Replayed(request, cached, shared, tokens))
        self._count_admission(request, shared, self._found(request, len(matched) * self.cache.page_size))
        return True

    def _match(self, request: TraceRequest, tokens: Tokens | None) -> Pages:
        """Pages of the cache that hold the prompt's beginning, or all of it: the token behind it is asked for too."""
        if tokens is None or self.cache.prefix_cache is None:
            return array("q")
        return self.cache.prefix_cache.match(tokens[: request.input_length + 1])

    def _found(self, request: TraceRequest, matched: int) -> int:
        """Tokens of the prompt in the cache, where whole pages hold `matched` of them: a page that crosses the end of
        the last block in common holds some of that block too."""
        block_end = -(-matched // BLOCK_SIZE) * BLOCK_SIZE
        return block_end if matched and block_end - matched < self.cache.page_size else matched

    def _count_admission(self, request: TraceRequest, shared: int, found: int) -> None:
        counts = self.counts
        counts.admitted += 1
        counts.prompt_tokens += request.input_length
        counts.hits += found > 0
        counts.found_tokens += found
        counts.shared_tokens += shared

    def _held_once(self, pages: Sequence[int]) -> int:
        """How many of these pages have one owner."""
        return int((self.cache.allocator.references_of(pages) == 1).sum())

    def _advance(self) -> None:
        """To the next completed answer. Until then nobody can be admitted, since growth was reckoned with."""
        steps = min(request.tokens_left for request in self.live)
        self._count(steps, grow=1, memory_bound=len(self.live) < self.concurrency)
        self.cache.extend([r.cached for r in self.live], [steps] * len(self.live))
        finished = [request for request in self.live if request.tokens_left == 0]
        self.live = [request for request in self.live if request.tokens_left > 0]
        for request in finished:
            self._finish(request)

    def _finish(self, request: Replayed) -> None:
        """Leave what can be shared in the prefix cache, which evicts what has not been used for longest where that is
        too much."""
        pages = request.cached.pages
        self.cache.close(request.cached, request.tokens)
        self._retained += self._held_once(pages)
        if self._retained > self.retained_pages:
            self._retained -= self.cache.evict(self._retained - self.retained_pages)

    def _count(self, steps: int, grow: int, memory_bound: bool = False) -> None:
        """Add up `steps` steps, in each of which every live request gains `grow` tokens first."""
        size, counts = self.cache.page_size, self.counts
        lens = [request.cached.seq_len for request in self.live]
        tokens = steps * sum(lens) + grow * len(lens) * steps * (steps + 1) // 2
        empty = sum(
            _padding(size, length, length + steps) if grow else steps * (-length % size) for length in lens
        )
        own = sum(length + -length % size for length in lens)
        others = self.cache.allocator.pages_used * size - own  # shared pages once; negative where many share
        counts.steps += steps
        counts.live_steps += steps * len(lens)
        counts.token_steps += tokens
        counts.empty_steps += empty
        counts.slot_steps += tokens + empty + steps * others
        counts.memory_bound_steps += steps if memory_bound else 0
        counts.peak_live = max(counts.peak_live, len(lens))
        ends = [length + grow * steps for length in lens]  # most pages are used at the end
        last_empty = sum(-end % size for end in ends)
        slots = others + sum(ends) + last_empty
        if slots > counts.peak_slots:
            counts.peak_slots, counts.peak_empty = slots, last_empty


def _padding(page_size: int, start: int, end: int) -> int:
    """Slots after the last token of a request's last page, summed over the lengths start + 1 to end."""

    def up_to(length: int) -> int:
        pages, rest = divmod(length, page_size)
        return pages * page_size * (page_size - 1) // 2 + rest * page_size - rest * (rest + 1) // 2

    return up_to(end) - up_to(start)
