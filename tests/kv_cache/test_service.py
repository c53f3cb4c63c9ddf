"""Requests and a prefix cache under long random service: rows, pages, owners, table and contents stay in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fa_research.errors import CacheError, ConfigError, KVCacheFull
from fa_research.kv_cache import CachedRequest, PagedKVCache, PrefixCache
from tests.helpers import age, examples, make_cache, slots_of, table_row
from tests.kv_cache.states import cache_state

LIMIT = 70  # tokens of a request; no multiple of the page sizes below but 1
ROWS = 4
OFFSETS = st.sampled_from([0, 0, 0, -1, 1])
SALTS = st.sampled_from([None, "adapter"])
Text = tuple[int, ...]
Prefix = tuple[str | None, Text]  # a salt and tokens


class Service(RuleBasedStateMachine):
    """The model: `texts` holds each request's tokens, `salts` its salt, and `tree` the page of every whole-page prefix
    that the prefix cache knows, with the number of its last use. What is written for a token is a number that stands
    for all tokens up to it, so that a request which reads another's page shows it. Free pages are NaN."""

    @initialize(page_size=st.sampled_from([1, 4, 16]), scarcity=st.integers(1, 4), seed=st.integers(0, 99))
    def start(self, page_size: int, scarcity: int, seed: int) -> None:
        pages = -(-LIMIT * scarcity // (2 * page_size)) + 1
        plain = make_cache(pages, page_size, max_requests=ROWS, max_context_len=LIMIT)
        age(plain, seed)
        self.cache = PagedKVCache(
            plain.req_to_token, plain.allocator, plain.kv, poison=True, check_invariants=True,
            prefix_cache=PrefixCache(plain.allocator),
        )  # fmt: skip
        self.size = page_size
        self.texts: dict[CachedRequest, list[int]] = {}
        self.salts: dict[CachedRequest, str | None] = {}
        self.tree: dict[Prefix, tuple[int, int]] = {}
        self.uses = 0
        self.numbers: dict[Prefix, int] = {}
        self.closed: list[CachedRequest] = []

    # Requests come and grow.

    @rule(data=st.data(), salt=SALTS, computed=st.booleans(), closed=st.booleans())
    def open(self, data: st.DataObject, salt: str | None, computed: bool, closed: bool) -> None:
        """With the known beginning of a prompt, which may be another request's text, or shorter than a page.
        `computed`: the rest of the prompt follows, and enters the tree, where its end may lie inside another run.
        `closed`: the request ends with that, so that rows are free for more prompts."""
        prompt = self._some_text(data, "prompt")
        before = cache_state(self.cache)
        assert self.cache.prefix_cache is not None
        prefix = self.cache.prefix_cache.match(prompt, salt)
        assert cache_state(self.cache) == before
        expected = []
        for end in range(self.size, len(prompt), self.size):
            if (salt, prompt[:end]) not in self.tree:
                break
            expected.append(self.tree[salt, prompt[:end]][0])
        assert list(prefix) == expected
        if len(self.texts) == ROWS:
            with pytest.raises(ConfigError, match=rf"kv\.max_requests={ROWS}"):
                self.cache.open(prefix)
            assert cache_state(self.cache) == before
            return
        request = self.cache.open(prefix)
        known = len(prefix) * self.size
        self.texts[request], self.salts[request] = list(prompt[:known]), salt
        if not computed:
            return
        rest = prompt[known:]
        if not rest or self._admits(
            [request], [len(prompt)], lambda: self.cache.extend([request], [len(rest)])
        ):
            self._write(request, list(rest))
            self.cache.insert(request, prompt, salt)
            self._note_insert(request, len(prompt))
        if closed:
            self.cache.close(request)
            del self.texts[request], self.salts[request]

    @rule(data=st.data(), salt=SALTS, count=st.integers(2, 5))
    def serve(self, data: st.DataObject, salt: str | None, count: int) -> None:
        """Prompts one after another: the tree branches inside runs, and is asked for the branches."""
        for _ in range(count):
            if len(self.texts) == ROWS:
                self.close(data, donate=True)
            self.open(data, salt, computed=True, closed=True)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(list(self.texts)), unique=True, min_size=1))
        new = [data.draw(st.integers(0, 40)) for _ in some]
        seq_lens = [len(self.texts[r]) + n for r, n in zip(some, new, strict=True)]
        if self._admits(some, seq_lens, lambda: self.cache.extend(some, new)):
            for request, count in zip(some, new, strict=True):
                self._write(request, [data.draw(st.integers(0, 1))] * count)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        """Room ahead of the tokens: it changes no length."""
        request = self._some_request(data)
        seq_len = len(self.texts[request]) + data.draw(st.integers(0, 40))
        self._admits([request], [seq_len], lambda: self.cache.reserve([request], [seq_len]))

    @precondition(lambda self: 0 < len(self.texts) < ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self._some_request(data)
        prefix = data.draw(st.integers(0, len(self.texts[parent])))
        free = self.cache.allocator.pages_free
        child = self.cache.fork(parent, prefix)
        whole = prefix // self.size * self.size
        assert child.seq_len == whole and child.row != parent.row
        assert self.cache.allocator.pages_free == free, "sharing takes no page"
        self.texts[child], self.salts[child] = self.texts[parent][:whole], self.salts[parent]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """Refused exactly where the shortened end lies in a page with another owner."""
        request = self._some_request(data)
        seq_len = data.draw(st.integers(0, len(self.texts[request])))
        owners = self._owners()
        end = -(-len(self.texts[request]) // self.size)
        if any(owners[page] > 1 for page in request.pages[seq_len // self.size : end]):
            self._refused(
                "would be written and has other owners", lambda: self.cache.shrink([request], [seq_len])
            )
        else:
            self.cache.shrink([request], [seq_len])
            del self.texts[request][seq_len:]

    # What is computed is kept, and given up.

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        request = self._some_request(data)
        count = data.draw(st.integers(0, len(self.texts[request])))
        self.cache.insert(request, self.texts[request][:count], self.salts[request])
        self._note_insert(request, count)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), donate=st.booleans())
    def close(self, data: st.DataObject, donate: bool) -> None:
        request = self._some_request(data)
        if donate:
            self._note_insert(request, len(self.texts[request]))
            self.cache.close(request, self.texts[request], self.salts[request])
        else:
            self.cache.close(request)
        del self.texts[request], self.salts[request]
        self.closed.append(request)

    @rule(wanted=st.integers(0, 12))
    def evict(self, wanted: int) -> None:
        assert self.cache.evict(wanted) == self._note_eviction(wanted)

    @rule()
    def forget(self) -> None:
        self.cache.forget_prefixes()
        self.tree.clear()

    @rule(seed=st.integers(0, 99))
    def churn(self, seed: int) -> None:
        self.cache.allocator.churn(seed)

    # Calls that make no sense.

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        request, cache = self._some_request(data), self.cache
        length = len(self.texts[request])
        self._refused("named twice", lambda: cache.extend([request, request], [1, 1]))
        self._refused("named twice", lambda: cache.shrink([request, request], [0, 0]))
        self._refused("extend by -1 tokens", lambda: cache.extend([request], [-1]))
        self._refused(f"shrink .* to {length + 1} tokens", lambda: cache.shrink([request], [length + 1]))
        self._refused(f"fork .* at {length + 1} tokens", lambda: cache.fork(request, length + 1))
        self._refused(f"insert of {length + 1} tokens", lambda: cache.insert(request, [0] * (length + 1)))
        self._refused(f"insert of {length + 1} tokens", lambda: cache.close(request, [0] * (length + 1)))

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def refuse_closed(self, data: st.DataObject) -> None:
        request, cache = data.draw(st.sampled_from(self.closed)), self.cache
        others = list(self.texts)[:1]
        calls: list[Callable[[], object]] = [
            lambda: cache.extend([*others, request], [1] * (len(others) + 1)),
            lambda: cache.reserve([request], [1]),
            lambda: cache.shrink([request], [0]),
            lambda: cache.fork(request, 0),
            lambda: cache.insert(request, []),
            lambda: cache.close(request),
        ]
        for call in calls:
            self._refused("not open", call)

    # What always holds.

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check()
        allocator, owners = self.cache.allocator, self._owners()
        assert allocator.pages_free + len(owners) == allocator.num_pages
        assert self.cache.req_to_token.rows_free == ROWS - len(self.texts)
        for page in range(1, allocator.num_pages + 1):
            assert allocator.references(page) == owners[page]

    @invariant()
    def each_request_reads_what_stands_for_its_tokens(self) -> None:
        for request, text in self.texts.items():
            assert request.seq_len == len(text)
            slots = table_row(self.cache, request)
            assert slots == slots_of(self.cache, request)
            expected = [self._number(request, end) for end in range(1, len(text) + 1)]
            assert self.cache.kv.k(0)[slots, 0, 0].tolist() == expected

    @invariant()
    def free_pages_and_page_0_are_nan(self) -> None:
        pages = self.cache.kv.k_paged(0)
        assert bool(pages[[0, *self.cache.allocator.free_pages()]].isnan().all())
        assert self.cache.req_to_token.req_to_token[0].eq(0).all()

    def teardown(self) -> None:
        """Without requests, free pages and those of the tree are all there are; without the tree all are free."""
        for request in list(self.texts):
            self.cache.close(request, self.texts[request], self.salts[request])
        if hasattr(self, "cache"):
            assert self.cache.prefix_cache is not None
            tree, total = list(self.cache.prefix_cache.held_pages()), self.cache.allocator.num_pages
            assert self.cache.allocator.pages_free + len(tree) == total
            assert self.cache.evict(total) == len(tree) and self.cache.allocator.pages_free == total

    # The model.

    def _some_request(self, data: st.DataObject) -> CachedRequest:
        return data.draw(st.sampled_from(list(self.texts)))

    def _some_text(self, data: st.DataObject, label: str) -> Text:
        """A text that the cache may know, cut near a page's border, and some tokens more. Of two tokens, so that texts
        begin alike and part anywhere."""
        known = sorted({tuple(text) for text in self.texts.values()} | {text for _, text in self.tree})
        text = data.draw(st.sampled_from(known), label) if known else ()
        near = st.builds(lambda pages, off: max(0, pages * self.size + off), st.integers(0, 4), OFFSETS)
        return (text[: data.draw(near)] + (data.draw(st.integers(0, 1)),) * data.draw(near))[:LIMIT]

    def _owners(self) -> Counter[int]:
        held = Counter(page for request in self.texts for page in request.pages)
        held.update(page for page, _ in self.tree.values())
        return held

    def _number(self, request: CachedRequest, end: int) -> int:
        prefix = (self.salts[request], tuple(self.texts[request][:end]))
        return self.numbers.setdefault(prefix, len(self.numbers) + 1)

    def _note_insert(self, request: CachedRequest, count: int) -> None:
        self.uses += 1
        for index in range(count // self.size):
            prefix = (self.salts[request], tuple(self.texts[request][: (index + 1) * self.size]))
            page = self.tree[prefix][0] if prefix in self.tree else request.pages[index]
            self.tree[prefix] = page, self.uses

    def _note_eviction(self, wanted: int) -> int:
        """One page at a time: of the prefixes that no other one continues and no request holds, the one that was used
        least recently."""
        held = {page for request in self.texts for page in request.pages}
        for done in range(wanted):
            inner = {(salt, text[: -self.size]) for salt, text in self.tree}
            ends = [p for p, (page, _) in self.tree.items() if p not in inner and page not in held]
            if not ends:
                return done
            del self.tree[min(ends, key=lambda prefix: self.tree[prefix][1])]
        return wanted

    def _refused(self, message: str, call: Callable[[], object]) -> None:
        before = cache_state(self.cache)
        with pytest.raises(CacheError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and cache_state(self.cache) == before

    def _admits(self, requests: list[CachedRequest], seq_lens: list[int], grow: Callable[[], object]) -> bool:
        """Run `grow`, which must raise and change nothing exactly where the lengths do not fit."""
        size, before = self.size, cache_state(self.cache)
        missing = sum(max(0, -(-n // size) - len(r.pages)) for r, n in zip(requests, seq_lens, strict=True))
        free, tree = self.cache.allocator.pages_free, dict(self.tree)
        if max(seq_lens) > LIMIT:
            with pytest.raises(ConfigError, match=f"passes the context limit of {LIMIT} tokens"):
                grow()
        elif self._note_eviction(max(0, missing - free)) < missing - free:
            self.tree = tree
            with pytest.raises(KVCacheFull) as error:
                grow()
            assert (error.value.requested, error.value.free) == (missing, free)
        else:
            grow()
            assert self.cache.allocator.pages_free == max(0, free - missing)
            return True
        assert cache_state(self.cache) == before
        return False

    def _write(self, request: CachedRequest, tokens: list[int]) -> None:
        """What the forward pass would do with the new slots."""
        first = len(self.texts[request])
        self.texts[request] += tokens
        numbers = [self._number(request, end) for end in range(first + 1, len(self.texts[request]) + 1)]
        slots = torch.tensor(table_row(self.cache, request)[first:], dtype=torch.int64)
        values = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 8)
        self.cache.kv.write(0, values, values, slots)


TestService = Service.TestCase
TestService.settings = examples(120, stateful_step_count=30)
