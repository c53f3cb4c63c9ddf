"""What went wrong in other engines, each as the test that would have caught it.

CUDA-graph failures stand with the engine's tests; what is here needs the cache, the metadata and the backends alone.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fa_research import backends
from fa_research.attention.local import chunk_metadata
from fa_research.errors import ConfigError, KVCacheFull, Unsupported
from fa_research.kv_cache import CachedRequest
from fa_research.masks import Causal, Chunked
from fa_research.metadata import FlashAttentionMetadata, fill_metadata
from tests.helpers import Scene, age, examples, make_cache, make_spec, slots_of, table_row
from tests.kv_cache.states import cache_state

NAMES = pytest.mark.parametrize("name", backends.names())
CUDA = pytest.mark.gpu


def sizes(cpu: tuple[int, ...], cuda: tuple[int, ...]) -> Any:
    on_gpu = [pytest.param("cuda", size, marks=CUDA) for size in cuda]
    return pytest.mark.parametrize(("device", "page_size"), [*(("cpu", size) for size in cpu), *on_gpu])


def dtype_for(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@NAMES
@sizes(cpu=(1, 16, 128), cuda=(1, 16, 128))
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_local_attention_over_shuffled_pages(name: str, device: str, page_size: int, decode: bool) -> None:
    """known failure: local attention wrong with paged KV, tables built in the wrong unit (SGLang #32902,
    #38187)."""
    lens = ((127, 1), (128, 1), (300, 1)) if decode else ((0, 5), (126, 4), (250, 8))
    scene = Scene(
        make_spec((2, 1), mask=Chunked(128)), lens, page_size, dtype_for(device), device, decode=decode
    )
    backend = scene.backend(name)
    scene.check_outputs(scene.run(backend), range(3))
    metadata, batch = backend.forward_metadata, scene.batch()
    assert metadata is not None
    for table_BP in (metadata.page_table_BP, chunk_metadata(metadata, batch, 128).page_table_BP):
        assert table_BP.min() >= 0 and table_BP.max() <= scene.cache.allocator.num_pages


@NAMES
@sizes(cpu=(3, 16), cuda=(1, 16, 128, 256))
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_a_request_at_exactly_the_context_limit(
    name: str, device: str, page_size: int, draft_tokens: int
) -> None:
    """known failure: page table too small for the last request that the limit allows (SGLang #29665). Draft
    tokens are several new tokens at the end; without them it is a decode step in the buffers of
    captured steps."""
    new = max(1, draft_tokens)
    decode = draft_tokens == 0
    lens = ((50 - new, new), (9, new))  # 50 is a multiple of no page size but 1
    scene = Scene(make_spec((2, 1)), lens, page_size, dtype_for(device), device, decode=decode, slack=0)
    backend = scene.backend(name)
    assert scene.cache.req_to_token.max_context_len == 50 == scene.requests[0].seq_len
    state = backend.init_cuda_graph_state(2, 50)
    scene.check_outputs(scene.run(backend, static=state if decode else None), range(2))
    metadata = backend.forward_metadata
    assert metadata is not None and metadata.page_table_BP.shape[1] == -(-50 // page_size)
    before = cache_state(scene.cache)
    with pytest.raises(ConfigError, match="a request of 51 tokens passes the context limit of 50"):
        scene.cache.extend(scene.requests, [1, 1])
    assert cache_state(scene.cache) == before


@examples(60)
@given(st.data())
def test_a_nearly_full_cache_admits_what_fits_and_nothing_else(data: st.DataObject) -> None:
    """known failure: prefill out of memory when the page size is large (SGLang #7353): tokens were counted as
    if every page were full."""
    page_size = data.draw(st.sampled_from([1, 16, 64, 256]))
    pages = data.draw(st.integers(2, 9))
    cache = make_cache(pages, page_size, max_requests=5, max_context_len=6 * page_size)
    live = [cache.open() for _ in range(data.draw(st.integers(1, 5)))]
    for _ in range(12):
        grow = [data.draw(st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1])) for _ in live]
        new_pages = sum(
            (r.seq_len + n + page_size - 1) // page_size - len(r.pages)
            for r, n in zip(live, grow, strict=True)
        )
        if any(r.seq_len + n > 6 * page_size for r, n in zip(live, grow, strict=True)):
            continue
        before, free = cache_state(cache), cache.allocator.pages_free
        if new_pages > free:
            with pytest.raises(KVCacheFull, match=f"{new_pages} pages requested, {free} pages free"):
                cache.extend(live, grow)
            assert cache_state(cache) == before
        else:
            cache.extend(live, grow)
            assert cache.allocator.pages_free == free - new_pages


def test_no_slot_leaks_in_a_long_run() -> None:
    """known failure: slots leak (SGLang #11970, #6888, #7130): free + used = total after every operation,
    refused ones among them, and everything is free at the end."""
    rng = random.Random(0)
    cache = make_cache(30, 4, max_requests=6, max_context_len=48)
    live: list[CachedRequest] = []
    outcomes = dict.fromkeys(("opened", "forked", "grown", "full", "too long", "closed"), 0)
    for _ in range(3000):
        step = rng.random()
        if step < 0.2 and cache.req_to_token.rows_free:
            parent = rng.choice(live) if live and rng.random() < 0.5 else None
            live.append(cache.fork(parent, rng.randint(0, parent.seq_len)) if parent else cache.open())
            outcomes["forked" if parent else "opened"] += 1
        elif step < 0.85 and live:
            some = rng.sample(live, rng.randint(1, len(live)))
            try:
                cache.extend(some, [rng.randint(0, 9) for _ in some])
                outcomes["grown"] += 1
            except KVCacheFull:
                outcomes["full"] += 1
            except ConfigError:
                outcomes["too long"] += 1
        elif live:
            cache.close(live.pop(rng.randrange(len(live))))
            outcomes["closed"] += 1
        cache.check()
        held = {page for request in live for page in request.pages}
        assert cache.allocator.pages_free + len(held) == 30 and cache.allocator.pages_used == len(held)
        assert cache.req_to_token.rows_free + len(live) == 6
    assert min(outcomes.values()) > 20, outcomes
    for request in live:
        cache.close(request)
    assert cache.allocator.pages_free == 30 and cache.req_to_token.rows_free == 6


def test_live_requests_with_one_prefix_keep_it_when_others_leave() -> None:
    """known failure: prefix cache remapped two live identical prefixes (mini-sglang #142). Freed pages are
    overwritten."""
    cache = make_cache(40, 4, max_context_len=40)
    age(cache, 1)
    cache.kv.poison()
    parent = cache.open()
    cache.extend([parent], [18])
    cache.kv.k(0)[table_row(cache, parent)] = torch.arange(18.0).view(-1, 1, 1)
    first, second = cache.fork(parent, 17), cache.fork(parent, 18)
    assert first.pages == second.pages == parent.pages[:4]
    for request in (first, second):
        cache.extend([request], [5])
    leaving = [parent.pages[4], *first.pages[4:]]
    cache.close(parent)
    cache.close(first)
    cache.kv.k_paged(0)[leaving] = torch.nan
    newcomer = cache.open()
    cache.extend([newcomer], [20])
    cache.kv.k(0)[table_row(cache, newcomer)] = -1.0
    assert cache.kv.k(0)[table_row(cache, second)[:16], 0, 0].tolist() == list(range(16))
    assert not set(newcomer.pages) & set(second.pages)


@NAMES
@sizes(cpu=(3,), cuda=(16, 128, 256))
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_padding_brings_no_nan(name: str, device: str, page_size: int, static: bool) -> None:
    """known failure: NaN from padding (SGLang #1779, #18659, vLLM #37442): NaN in page 0, in unused slots, in
    the queries of padded entries, and in what they write."""
    lens = ((0, 1), (2, 1), (33, 1))
    scene = Scene(make_spec((4, 2), has_sink=True), lens, page_size, dtype_for(device), device, decode=True)
    backend = scene.backend(name)
    state = backend.init_cuda_graph_state(8, scene.cache.req_to_token.max_context_len)
    scene.check_outputs(scene.run(backend, padding=5, static=state if static else None), range(3))
    own = torch.tensor(
        [slot for request in scene.requests for slot in slots_of(scene.cache, request)], device=device
    )
    assert scene.cache.kv.k(1)[own].isfinite().all(), "padding wrote to a slot that is in use"


@NAMES
@pytest.mark.gpu
@pytest.mark.quiet  # each pool takes 17 GB
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_only_the_top_pages_of_a_pool_beyond_int32(name: str, page_size: int, decode: bool) -> None:
    """known failure: int32 offsets overflow (vLLM #50427, #47671, SGLang #34025, flashinfer #3136). One
    layer's keys are more than 2^31 elements, and every page in use lies beyond them."""
    lowest = (2**31 // (8 * 128)) // page_size + 1
    lens = ((300, 1), (0, 1), (1000, 1)) if decode else ((300, 50), (0, 130))
    spec = make_spec((16, 8), head_dim=128)
    scene = Scene(spec, lens, page_size, torch.bfloat16, "cuda", decode=decode, lowest_page=lowest)
    assert min(min(request.pages) for request in scene.requests) * page_size * 8 * 128 >= 2**31
    backend = scene.backend(name)
    if name == "flex":  # torch's kernels do overflow: what matters is that nothing wrong comes out
        with pytest.raises(Unsupported, match="count in 32 bits"):
            scene.run(backend)
        return
    scene.check(backend)


@NAMES
@sizes(cpu=(16,), cuda=(16, 128, 256))
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_a_result_is_independent_of_the_neighbours(
    name: str, device: str, page_size: int, decode: bool
) -> None:
    """known failure: split-KV changes a request's result with its neighbours (flash-attention #1897, SGLang
    #10651). The same request alone and in a batch: bit for bit with deterministic=True."""
    long = 9000 if device == "cuda" else 1100  # long enough that its keys are split
    lens = (
        ((long, 1), (3, 1), (40, 1)) if decode else ((600 if device == "cuda" else 30, 7), (0, 20), (200, 1))
    )
    scene = Scene(make_spec((2, 1)), lens, page_size, dtype_for(device), device, decode=decode)
    backend = scene.backend(name, deterministic=True)
    together = scene.run(backend)
    for i in range(3):
        (alone,) = scene.run(backend, [i])
        assert torch.equal(alone, together[i]), f"request {i} differs by {(alone - together[i]).abs().max()}"
    scene.check_outputs(together, range(3))


def test_tables_come_from_a_churned_allocator() -> None:
    """known failure: benchmarks flatter a backend, pages permuted within a request only (FlashInfer) or
    `arange` tables (vLLM). Pages of a request are in no order and far apart, and requests lie among
    each other."""
    cache = make_cache(400, 4, max_requests=4, max_context_len=400)
    cache.allocator.churn(seed=0)
    requests = [cache.open() for _ in range(4)]
    cache.extend(requests, [400] * 4)
    for request in requests:
        steps = [b - a for a, b in zip(request.pages, request.pages[1:], strict=False)]
        assert sum(step == 1 for step in steps) < 10 and sum(step < 0 for step in steps) > 25
        assert max(request.pages) - min(request.pages) > 300
        assert table_row(cache, request) == slots_of(cache, request)


def test_every_scene_of_these_tests_is_churned() -> None:
    """known failure: the same; what the semantics tests run on must not be easier than service."""
    scene = Scene(make_spec(mask=Causal()), ((60, 20), (70, 10), (5, 90)), 2, torch.float32)
    metadata = FlashAttentionMetadata.allocate(3, 95, 2, "cpu")
    fill_metadata(metadata, scene.batch(), scene.table, 2)
    for pages, total in zip(metadata.page_table_BP.tolist(), scene.totals, strict=True):
        own = pages[: -(-total // 2)]
        assert own != sorted(own) and own != sorted(own, reverse=True) and max(own) - min(own) > 2 * len(own)
    assert scene.cache.allocator.references(0) == 0
