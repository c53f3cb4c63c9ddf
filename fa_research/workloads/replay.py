"""A trace replayed through the paged cache: who is admitted, what grows, what is shared, what is given back.

The model of time: a request is prefilled in no time when it is admitted, then gains one token a step, and leaves when
its answer is complete. Requests wait in order of arrival; the next one is admitted as soon as there is a place
(`concurrency`) and as many free pages as it and all live requests will still need. So nobody is preempted, and the
queue is never empty before the end: a service at its limit, whose arrival times matter by their order alone. The replay
ends when the last request is admitted, before the service would run empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.workloads.traces import BLOCK_SIZE, TraceRequest


@dataclass(slots=True, eq=False)
class Replayed:
    """A request in the cache. `shared_len`: tokens at its beginning whose pages it took from another request;
    `last_used`: the number of the latest admission that used it."""

    trace: TraceRequest
    cached: CachedRequest
    shared_len: int
    last_used: int

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


class PrefixIndex:
    """Which requests in the cache begin with a block: SGLang's radix cache reduced to what a trace knows of prompts.
    The block's id stands for the whole prefix, so the last block that is known is enough."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[Replayed, None]] = {}

    def add(self, request: Replayed) -> None:
        for block in request.trace.blocks:
            self._holders.setdefault(block, {})[request] = None

    def remove(self, request: Replayed) -> None:
        for block in request.trace.blocks:
            holders = self._holders[block]
            del holders[request]
            if not holders:
                del self._holders[block]

    def find(self, blocks: Sequence[int]) -> tuple[Replayed | None, int]:
        """The newest request that holds the longest known prefix of `blocks`, and that prefix in tokens."""
        known = 0
        while known < len(blocks) and blocks[known] in self._holders:
            known += 1
        holder = next(reversed(self._holders[blocks[known - 1]])) if known else None
        return holder, known * BLOCK_SIZE

    def is_alone(self, request: Replayed) -> bool:
        """Whether no other request holds all of this one's blocks (it has at least one)."""
        return len(self._holders[request.trace.blocks[-1]]) == 1


@dataclass(slots=True)
class Replay:
    """One replay. `live` are the requests that generate, `retained` finished ones whose prompts later requests may
    share: at most `concurrency` of them, and at most `retained_pages` pages."""

    cache: PagedKVCache
    concurrency: int
    prefix_sharing: bool
    retained_pages: int
    live: list[Replayed] = field(default_factory=list)
    retained: list[Replayed] = field(default_factory=list)
    counts: ReplayCounts = field(default_factory=ReplayCounts)
    index: PrefixIndex = field(default_factory=PrefixIndex)

    def run(self, requests: Sequence[TraceRequest]) -> None:
        """Replay all of them but those that no empty pool could hold, which are counted."""
        fitting = [r for r in requests if self._pages(r.final_length) <= self.cache.allocator.num_pages]
        self.counts.never_fit += len(requests) - len(fitting)
        queue = deque(fitting)
        while True:
            while queue and len(self.live) < self.concurrency and self._admit(queue[0]):
                queue.popleft()
            if not queue:
                break
            self._advance()
        if self.live:
            self._count(1, grow=0)

    def drop_retained(self) -> None:
        """Give back what no live request holds."""
        while self.retained:
            self._evict(self.retained[0])

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def _pages_to_come(self) -> int:
        """What live requests will still ask for."""
        return sum(self._pages(r.trace.final_length) - len(r.cached.pages) for r in self.live)

    def _admit(self, request: TraceRequest) -> bool:
        """Admit the request if its pages, to the end of its answer, are free. Where nobody is live any more, retained
        prompts make room."""
        while True:
            holder, found = self.index.find(request.blocks) if self.prefix_sharing else (None, 0)
            # At least one token of the prompt is computed: the first of the answer follows from it.
            shared = min(found, request.input_length - 1) // self.cache.page_size * self.cache.page_size
            needed = self._pages(request.final_length) - shared // self.cache.page_size
            if needed <= self.cache.allocator.pages_free - self._pages_to_come():
                break
            if self.live:
                return False
            self._evict(min(self.retained, key=lambda r: r.last_used))
        self._open(request, holder if shared else None, shared)
        counts = self.counts
        counts.prompt_tokens += request.input_length
        counts.hits += found > 0
        counts.found_tokens += found
        counts.shared_tokens += shared
        return True

    def _open(self, request: TraceRequest, holder: Replayed | None, shared: int) -> None:
        cached = self.cache.fork(holder.cached, shared) if holder is not None else self.cache.open()
        self.cache.extend([cached], [request.input_length - shared])
        self.counts.admitted += 1
        live = Replayed(request, cached, shared, self.counts.admitted)
        self.live.append(live)
        if self.prefix_sharing:
            self.index.add(live)
        if holder is not None:
            holder.last_used = self.counts.admitted
            if holder in self.retained and not self.index.is_alone(holder):
                self._evict(holder)  # the new request holds all that could be shared of it

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
        """Retain what can be shared, the least recently used going first where that is too much."""
        self.retained.append(request)
        if not (self.prefix_sharing and request.trace.blocks and self.index.is_alone(request)):
            self._evict(request)
        while len(self.retained) > self.concurrency or self._pages_retained() > self.retained_pages:
            self._evict(min(self.retained, key=lambda r: r.last_used))

    def _pages_retained(self) -> int:
        return sum(len(request.cached.pages) for request in self.retained)

    def _evict(self, request: Replayed) -> None:
        self.retained.remove(request)
        if self.prefix_sharing:
            self.index.remove(request)
        self.cache.close(request.cached)

    def _count(self, steps: int, grow: int, memory_bound: bool = False) -> None:
        """Add up `steps` steps, in each of which every live request gains `grow` tokens first."""
        size, counts = self.cache.page_size, self.counts
        lens = [request.cached.seq_len for request in self.live]
        tokens = steps * sum(lens) + grow * len(lens) * steps * (steps + 1) // 2
        empty = sum(
            _padding(size, length, length + steps) if grow else steps * (-length % size) for length in lens
        )
        idle = sum(-request.cached.seq_len % size for request in self.retained)
        own = sum(length + -length % size for length in lens)
        others = self.cache.allocator.pages_used * size - own  # shared pages once; negative where many share
        counts.steps += steps
        counts.live_steps += steps * len(lens)
        counts.token_steps += tokens
        counts.empty_steps += empty + steps * idle
        counts.slot_steps += tokens + empty + steps * others
        counts.memory_bound_steps += steps if memory_bound else 0
        counts.peak_live = max(counts.peak_live, len(lens))
        ends = [length + grow * steps for length in lens]  # most pages are used at the end
        last_empty = sum(-end % size for end in ends)
        slots = others + sum(ends) + last_empty
        if slots > counts.peak_slots:
            counts.peak_slots, counts.peak_empty = slots, last_empty + idle


def _padding(page_size: int, start: int, end: int) -> int:
    """Slots after the last token of a request's last page, summed over the lengths start + 1 to end."""

    def up_to(length: int) -> int:
        pages, rest = divmod(length, page_size)
        return pages * page_size * (page_size - 1) // 2 + rest * page_size - rest * (rest + 1) // 2

    return up_to(end) - up_to(start)
