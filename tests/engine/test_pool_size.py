"""The pool an engine takes: its size and its order, what it refuses, and how debugging marks it."""

from __future__ import annotations

import pytest
import torch

from fa_research.config import KVConfig
from fa_research.engine.engine import Needs, create_cache
from fa_research.errors import ConfigError
from fa_research.kv_cache import TokenToKVPool
from fa_research.kv_cache.capacity import free_bytes
from fa_research.models import attention_specs
from tests.engine.built import MODEL, NEEDS, config_of, engine_of


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_the_pool_is_what_the_workload_needs(page_size: int) -> None:
    cache = engine_of(config_of(kv=KVConfig(page_size))).cache
    assert cache.allocator.num_pages == sum(-(-n // page_size) for n in NEEDS.seq_lens)
    assert cache.req_to_token.max_requests == 3
    requests = [cache.open() for _ in NEEDS.seq_lens]
    cache.extend(requests, NEEDS.seq_lens)
    assert cache.allocator.pages_free == 0


def test_the_free_list_is_churned_unless_told_otherwise() -> None:
    free = engine_of(config_of(kv=KVConfig(1))).cache.allocator.free_pages()
    assert sorted(free) == list(range(1, 55)) and list(free) != sorted(free, reverse=True)
    assert engine_of(config_of(kv=KVConfig(1))).cache.allocator.free_pages() == free
    assert engine_of(config_of(kv=KVConfig(1), seed=1)).cache.allocator.free_pages() != free
    orderly = engine_of(config_of(kv=KVConfig(1, churn=False))).cache.allocator
    assert list(orderly.alloc(3)) == [1, 2, 3]


REFUSED: list[tuple[KVConfig, Needs, str]] = [
    (KVConfig(16, num_pages=5), NEEDS, r"kv.num_pages=5 gives 5 pages.*the workload needs 6"),
    (KVConfig(16, memory_fraction=1e-9), NEEDS, r"kv.memory_fraction=1e-09 gives 0 pages.*the workload needs 6"),
    (KVConfig(16, max_requests=2), NEEDS, r"kv.max_requests=2: the workload has 3 requests"),
    (KVConfig(16), Needs((4097,), 1), r"context of 4097 tokens, model.max_context_len is 4096"),
]  # fmt: skip


@pytest.mark.parametrize(("kv", "needs", "message"), REFUSED)
def test_a_pool_that_cannot_serve_the_workload_is_refused(kv: KVConfig, needs: Needs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(config_of(kv=kv), needs)


def test_more_pages_and_rows_than_needed() -> None:
    cache = engine_of(config_of(kv=KVConfig(16, num_pages=50, max_requests=9))).cache
    assert (cache.allocator.num_pages, cache.req_to_token.max_requests) == (50, 9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.quiet])])
def test_the_pool_takes_the_fraction_of_free_memory_that_was_asked_for(device: str) -> None:
    """Within one per cent, the sink page included (and on the GPU in what the device says it has left)."""
    where, fraction = torch.device(device), 0.002 if device == "cpu" else 0.2
    config = config_of(kv=KVConfig(16, memory_fraction=fraction))
    if device == "cuda":
        torch.cuda.empty_cache()
    asked = free_bytes(where) * fraction
    cache = create_cache(config, NEEDS, attention_specs(MODEL), where, torch.float32)
    noise = 0.01 if device == "cuda" else 0.1  # other processes use the host's memory too
    assert abs(cache.kv.num_bytes / asked - 1) < noise
    per_page = TokenToKVPool.bytes_per_page(
        16, num_layers=1, num_kv_heads=1, head_dim=64, v_head_dim=64, dtype=torch.float32
    )
    assert cache.kv.num_bytes == (cache.allocator.num_pages + 1) * per_page
    if device == "cuda":
        gone = asked / fraction - free_bytes(where)
        assert abs(gone / asked - 1) < 0.01


def test_strict_debugging_poisons_and_checks() -> None:
    config = config_of(kv=KVConfig(16))
    config.debug.poison = config.debug.check_invariants = True
    cache = engine_of(config).cache
    assert bool(cache.kv.k_LNKD.isnan().all()) and bool(cache.kv.v_LNKV.isnan().all())
    request = cache.open()
    cache.extend([request], [20])
    request.pages.append(request.pages[0])
    with pytest.raises(AssertionError):
        cache.extend([request], [1])


def test_needs_count_whole_pages() -> None:
    assert Needs((1, 16, 17), 3).pages(16) == 4
    assert Needs((1, 16, 17), 3).pages(1) == 34
