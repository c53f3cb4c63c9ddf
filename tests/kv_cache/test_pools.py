"""The two tables of the cache: rows to slots, slots to keys and values; and how large they are made."""

from __future__ import annotations

import random

import pytest
import torch

from fa_research.config import KVConfig
from fa_research.errors import ConfigError
from fa_research.kv_cache import PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool, capacity
from tests.helpers import DEVICES, make_cache

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 4}


def make_pool(num_pages: int = 4, page_size: int = 3, dtype: torch.dtype = torch.float32) -> TokenToKVPool:
    return TokenToKVPool(num_pages, page_size, **SHAPE, dtype=dtype, device="cpu")


# Rows to slots.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_write_pages_of_a_large_batch(device: str, page_size: int) -> None:
    """Thousands of entries in one update, rows and page numbers in no order, entries beside them untouched."""
    rng, width = random.Random(page_size), 40
    pool = ReqToTokenPool(200, width * page_size, page_size=page_size, device=device)
    expected = pool.req_to_token.tolist()
    places = rng.sample([(row, index) for row in range(1, 201) for index in range(width)], 3000)
    pages = [rng.randrange(1, 2**31 // page_size) for _ in places]
    rows, indices = [row for row, _ in places], [index for _, index in places]
    pool.write_pages(rows, indices, [1] * len(places), pages)
    for (row, index), page in zip(places, pages, strict=True):
        for offset in range(page_size):
            expected[row][index * page_size + offset] = page * page_size + offset
    assert pool.req_to_token.tolist() == expected
    assert pool.req_to_token.dtype == torch.int32


def test_an_empty_update() -> None:
    pool = ReqToTokenPool(2, 8, page_size=4, device="cpu")
    pool.write_pages([], [], [], [])
    assert pool.req_to_token.eq(0).all()


def test_rows() -> None:
    """Row 0 is never handed out; a row comes back once."""
    pool = ReqToTokenPool(3, 8, page_size=4, device="cpu")
    rows = [pool.alloc() for _ in range(3)]
    assert sorted(rows) == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"kv\.max_requests=3 rows are all in use"):
        pool.alloc()
    pool.write_pages(rows, [0, 0, 0], [1, 1, 1], [1, 2, 3])
    pool.free(rows[1])
    assert pool.req_to_token[rows[1]].eq(0).all(), "a freed row points at the sink page"
    assert pool.req_to_token[[rows[0], rows[2]], 0].tolist() == [4, 12]
    for row in (rows[1], 0, 4):
        with pytest.raises(AssertionError):
            pool.free(row)
    assert pool.alloc() == rows[1]


@pytest.mark.parametrize(
    ("limit", "page_size", "width"), [(100, 16, 112), (112, 16, 112), (5, 256, 256), (7, 1, 7)]
)
def test_the_table_holds_whole_pages(limit: int, page_size: int, width: int) -> None:
    pool = ReqToTokenPool(2, limit, page_size=page_size, device="cpu")
    assert pool.req_to_token.shape == (3, width) and pool.req_to_token.is_contiguous()


def test_the_three_pools_must_agree_on_the_page_size() -> None:
    cache = make_cache(4, 4)
    with pytest.raises(AssertionError):
        PagedKVCache(cache.req_to_token, PagedAllocator(4, 2), cache.kv)


# Slots to keys and values.


def test_views_are_no_copies() -> None:
    pool = make_pool()
    assert pool.k(1).shape == (15, 2, 8) and pool.v(1).shape == (15, 2, 4)
    assert pool.k_paged(1).shape == (5, 3, 2, 8) and pool.v_paged(1).shape == (5, 3, 2, 4)
    pool.k_paged(1)[2, 1] = 7.0
    pool.v_paged(2)[4, 2] = 9.0
    assert pool.k(1)[2 * 3 + 1].eq(7).all() and pool.k_LNKD.eq(7).sum() == 16
    assert pool.v(2)[4 * 3 + 2].eq(9).all() and pool.v_LNKV.eq(9).sum() == 8


def test_memory_starts_finite_because_kernels_may_multiply_it_by_zero() -> None:
    pool = make_pool()
    assert pool.k_LNKD.eq(0).all() and pool.v_LNKV.eq(0).all()


def test_write_converts_to_the_dtype_of_the_pool() -> None:
    pool = make_pool(dtype=torch.float16)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    slots = torch.tensor([14, 0, 5])
    pool.write(2, k, v, slots)
    assert torch.equal(pool.k(2)[slots], k.half()) and torch.equal(pool.v(2)[slots], v.half())
    others = [n for n in range(15) if n not in (0, 5, 14)]
    assert pool.k(2)[others].eq(0).all() and pool.k_LNKD[:2].eq(0).all() and pool.v_LNKV[:2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_contents_are_normal_and_come_from_the_seed(dtype: torch.dtype) -> None:
    a, b, c = (make_pool(200, 3, dtype) for _ in range(3))
    for pool, seed in ((a, 5), (b, 5), (c, 6)):
        pool.fill_random(seed)
    assert torch.equal(a.k_LNKD, b.k_LNKD) and not torch.equal(a.k_LNKD, c.k_LNKD)
    assert not torch.equal(a.k_LNKD[0], a.k_LNKD[1]), "layers are not copies"
    for data in (a.k_LNKD.float(), a.v_LNKV.float()):
        assert abs(data.mean()) < 0.05 and abs(data.std() - 1) < 0.05


def test_poison_is_everywhere() -> None:
    pool = make_pool()
    pool.poison()
    assert pool.k_LNKD.isnan().all() and pool.v_LNKV.isnan().all()


def test_single_pages_are_poisoned_and_cleared_in_every_layer() -> None:
    pool = make_pool(num_pages=4, page_size=3)
    pool.poison([0, 3])
    pool.clear([3])
    pool.poison([4])
    for buffer in (pool.k_LNKD, pool.v_LNKV):
        nan = buffer.unflatten(1, (5, 3)).isnan().flatten(2)
        assert nan.all(2).tolist() == nan.any(2).tolist() == [[True, False, False, False, True]] * 3


# How many pages.


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_a_memory_fraction_is_met_within_one_percent(
    page_size: int, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool takes what was asked, never more; the sink page is counted."""
    free = 400_000_000
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free)
    shape = {"num_layers": 2, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "dtype": torch.float16}
    bytes_per_page = TokenToKVPool.bytes_per_page(page_size, **shape)
    config = KVConfig(page_size=page_size, memory_fraction=fraction)
    pages = capacity.choose_num_pages(
        config, bytes_per_page=bytes_per_page, pages_needed=1, device=torch.device("cpu")
    )
    pool = TokenToKVPool(pages, page_size, **shape, device="meta")
    assert 0.99 * free * fraction <= pool.num_bytes <= free * fraction
    assert pool.num_bytes == (pages + 1) * bytes_per_page


@pytest.mark.parametrize("device", DEVICES)
def test_free_memory_is_a_number_of_bytes_of_this_device(device: str) -> None:
    free = capacity.free_bytes(torch.device(device))
    assert 1 << 26 < free < 1 << 45
    if device == "cuda":
        assert free <= torch.cuda.get_device_properties(device).total_memory


def test_memory_that_torch_keeps_of_an_earlier_cell_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, `kv.memory_fraction` would give the second cell of a sweep a fraction of what the first one left."""
    kept = [70]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - sum(kept), 100))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert capacity.free_bytes(torch.device("cuda")) == 100


def choose(pages_needed: int, **kv: object) -> int:
    device = torch.device("cpu")
    return capacity.choose_num_pages(
        KVConfig(**kv),
        bytes_per_page=1000,
        pages_needed=pages_needed,
        device=device,  # type: ignore[arg-type]
    )


def test_num_pages_is_taken_as_it_is() -> None:
    assert choose(10, num_pages=10) == 10 and choose(10, num_pages=999) == 999


def test_without_a_size_the_workload_decides() -> None:
    assert choose(123) == 123


def test_a_pool_too_small_for_the_workload() -> None:
    with pytest.raises(
        ConfigError, match=r"kv\.num_pages=9 gives 9 pages of kv\.page_size=4.*needs 10; raise it"
    ):
        choose(10, num_pages=9, page_size=4)


def test_a_fraction_too_small_for_the_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 100_000)
    assert choose(9, memory_fraction=0.1) == 9, "ten pages fit, one of them is the sink"
    with pytest.raises(ConfigError, match=r"kv\.memory_fraction=0\.1 gives 9 pages"):
        choose(10, memory_fraction=0.1)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 10)
    with pytest.raises(ConfigError, match="gives 0 pages"):
        choose(1, memory_fraction=0.1)


@pytest.mark.gpu
def test_the_pool_takes_the_memory_that_it_says() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    shape = {"num_layers": 4, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "dtype": torch.bfloat16}
    bytes_per_page = TokenToKVPool.bytes_per_page(64, **shape)
    config = KVConfig(page_size=64, memory_fraction=0.05)
    device = torch.device("cuda")
    free = capacity.free_bytes(device)
    pages = capacity.choose_num_pages(config, bytes_per_page=bytes_per_page, pages_needed=1, device=device)
    pool = TokenToKVPool(pages, 64, **shape, device=device)
    assert 0.99 * 0.05 * free <= pool.num_bytes <= 0.05 * free
    assert pool.num_bytes <= torch.cuda.memory_allocated() - before <= 1.01 * pool.num_bytes


@pytest.mark.parametrize(
    ("size", "value"), [("page_size", 0), ("page_size", 257), ("max_requests", 0), ("max_context_len", -1)]
)
def test_a_table_of_impossible_size_is_refused(size: str, value: int) -> None:
    sizes = {"max_requests": 2, "max_context_len": 8, "page_size": 4} | {size: value}
    with pytest.raises(ConfigError, match=f"{size}={value}: must be"):
        ReqToTokenPool(**sizes, device="cpu")


@pytest.mark.parametrize(
    "size", ["num_pages", "page_size", "num_layers", "num_kv_heads", "head_dim", "v_head_dim"]
)
def test_a_pool_of_impossible_size_is_refused(size: str) -> None:
    sizes = dict.fromkeys(
        ("num_pages", "page_size", "num_layers", "num_kv_heads", "head_dim", "v_head_dim"), 4
    )
    with pytest.raises(ConfigError, match=f"{size}=0: must be"):
        TokenToKVPool(**(sizes | {size: 0}), dtype=torch.float32, device="cpu")
