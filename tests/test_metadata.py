"""The metadata of a pass against plain Python over pages, and what its static buffers promise."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fa_research.batch import ForwardBatch, extend_batch
from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.metadata import FlashAttentionMetadata, fill_metadata
from tests.helpers import DEVICES, age, decode_batch, examples, make_cache, no_synchronisation, tokens

UNTOUCHED = -7
LIMIT = 80
BATCHES = {
    "extend": [(0, 5), (0, 64), (0, 80)],
    "prefix": [(16, 4), (63, 17), (3, 30)],
    "mixed": [(0, 6), (79, 1), (15, 33), (0, 1)],
    "decode": [(0, 1), (15, 1), (16, 1), (79, 1)],
}
Lens = list[tuple[int, int]]


def requests_of(
    lens: Lens, page_size: int, device: str, seed: int = 3
) -> tuple[PagedKVCache, list[CachedRequest]]:
    pages = sum(-(-sum(pair) // page_size) for pair in lens) + 2
    cache = make_cache(pages, page_size, max_context_len=LIMIT, device=device)
    age(cache, seed)
    requests = [cache.open() for _ in lens]
    cache.extend(requests, [prefix for prefix, _ in lens])
    cache.extend(requests, [new for _, new in lens])
    return cache, requests


def batch_of(cache: PagedKVCache, requests: list[CachedRequest], lens: Lens, decode: bool) -> ForwardBatch:
    table, rows, prefixes = cache.req_to_token.req_to_token, [r.row for r in requests], [p for p, _ in lens]
    if decode:
        return decode_batch(table, rows, prefixes, LIMIT)
    return extend_batch(table, rows, prefixes, tokens([new for _, new in lens]))


def buffers(batch_size: int, page_size: int, device: str) -> FlashAttentionMetadata:
    """Static buffers for more requests than a batch has, full of a number that nobody writes."""
    metadata = FlashAttentionMetadata.allocate(batch_size, LIMIT, page_size, device)
    for tensor in tensors(metadata):
        tensor.fill_(UNTOUCHED)
    return metadata


def tensors(metadata: FlashAttentionMetadata) -> list[torch.Tensor]:
    values = (getattr(metadata, field.name) for field in fields(metadata))
    return [value for value in values if isinstance(value, torch.Tensor)]


def cumulative(lens: list[int]) -> list[int]:
    return [sum(lens[:i]) for i in range(len(lens) + 1)]


def check(
    metadata: FlashAttentionMetadata, requests: list[CachedRequest], lens: Lens, before: list[list[int]]
) -> None:
    totals = [sum(pair) for pair in lens]
    assert metadata.cache_seqlens_int32_B.tolist() == totals
    assert metadata.cu_seqlens_q_B1.tolist() == cumulative([new for _, new in lens])
    assert metadata.cu_seqlens_k_B1.tolist() == cumulative(totals)
    size = metadata.page_size
    begun = [
        list(request.pages[: -(-total // size)]) for request, total in zip(requests, totals, strict=True)
    ]
    assert metadata.page_table_BP.tolist() == [
        own + old[len(own) :] for own, old in zip(begun, before, strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("name", BATCHES)
def test_fill_against_plain_python(name: str, page_size: int, device: str) -> None:
    lens, count = BATCHES[name], len(BATCHES[name])
    cache, requests = requests_of(lens, page_size, device)
    static = buffers(count + 3, page_size, device)
    out, before = static.head(count), static.page_table_BP[:count].tolist()
    batch = batch_of(cache, requests, lens, name == "decode")
    fill_metadata(out, batch, cache.req_to_token.req_to_token, page_size)
    check(out, requests, lens, before)
    assert (out.max_seq_len_q, out.max_seq_len_k) == (batch.max_seq_len_q, batch.max_seq_len_k)
    # Entries beyond the batch are not touched.
    assert (
        static.page_table_BP[count:].eq(UNTOUCHED).all()
        and static.cache_seqlens_int32_B[count:].eq(UNTOUCHED).all()
    )
    for cu in (static.cu_seqlens_q_B1, static.cu_seqlens_k_B1):
        assert cu[count + 1 :].eq(UNTOUCHED).all()


@examples(40)
@given(
    page_size=st.integers(1, 20),
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=7),
    decode=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fill_of_any_batch(page_size: int, lens: Lens, decode: bool, seed: int) -> None:
    lens = [(prefix, 1) for prefix, _ in lens] if decode else lens
    cache, requests = requests_of(lens, page_size, "cpu", seed)
    out = buffers(len(lens), page_size, "cpu")
    before = out.page_table_BP.tolist()
    fill_metadata(out, batch_of(cache, requests, lens, decode), cache.req_to_token.req_to_token, page_size)
    check(out, requests, lens, before)


@pytest.mark.parametrize("device", DEVICES)
def test_static_buffers_serve_one_batch_after_the_other(device: str) -> None:
    """A short batch after a long one, larger and smaller: the same memory, the right contents, the plans gone."""
    static = buffers(4, 16, device)
    pointers = [tensor.data_ptr() for tensor in tensors(static)]
    for name in ("mixed", "extend", "decode", "prefix", "mixed"):
        lens = BATCHES[name]
        cache, requests = requests_of(lens, 16, device)
        out = static.head(len(lens))
        before = out.page_table_BP.tolist()
        out.plans["stale"] = 1
        fill_metadata(
            out, batch_of(cache, requests, lens, name == "decode"), cache.req_to_token.req_to_token, 16
        )
        check(out, requests, lens, before)
        assert out.plans == {}
        assert [tensor.data_ptr() for tensor in tensors(out)] == pointers


def test_head_shares_memory() -> None:
    static = buffers(8, 16, "cpu")
    for count in (1, 5, 8):
        head = static.head(count)
        assert (
            head.batch_size == count and head.page_size == 16 and head.cu_seqlens_q_B1.shape == (count + 1,)
        )
        assert head.page_table_BP.shape == (count, static.page_table_BP.shape[1])
        for whole, part in zip(tensors(static), tensors(head), strict=True):
            assert part.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize(("limit", "page_size", "width"), [(80, 16, 5), (81, 16, 6), (1, 256, 1), (7, 1, 7)])
def test_allocated_buffers_point_at_the_sink(limit: int, page_size: int, width: int) -> None:
    metadata = FlashAttentionMetadata.allocate(3, limit, page_size, "cpu")
    assert metadata.page_table_BP.shape == (3, width)
    assert all(tensor.dtype == torch.int32 and tensor.eq(0).all() for tensor in tensors(metadata))


def test_buffers_that_do_not_fit_the_batch_are_a_bug_of_the_caller() -> None:
    cache, requests = requests_of([(0, 40), (0, 3)], 4, "cpu")
    batch = batch_of(cache, requests, [(0, 40), (0, 3)], decode=False)
    table = cache.req_to_token.req_to_token
    for wrong in (
        FlashAttentionMetadata.allocate(3, 40, 4, "cpu"),  # another number of requests
        FlashAttentionMetadata.allocate(2, 36, 4, "cpu"),  # a table one page too narrow
        FlashAttentionMetadata.allocate(2, 40, 2, "cpu"),  # another page size
    ):
        with pytest.raises(AssertionError):
            fill_metadata(wrong, batch, table, 4)


def test_padded_entries_have_one_token_in_page_0() -> None:
    cache, requests = requests_of([(20, 1)], 4, "cpu")
    batch = decode_batch(cache.req_to_token.req_to_token, [requests[0].row, 0, 0], [20, 1, 1], LIMIT)
    out = buffers(3, 4, "cpu")
    fill_metadata(out, batch, cache.req_to_token.req_to_token, 4)
    assert out.cache_seqlens_int32_B.tolist() == [21, 1, 1]
    assert out.page_table_BP[1:, 0].tolist() == [0, 0] and out.page_table_BP[1:, 1:].eq(UNTOUCHED).all()
    assert batch.out_cache_loc_T[1:].tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16])
def test_filling_allocates_nothing_and_waits_for_nothing(page_size: int) -> None:
    """Memory counters stay, and no synchronising call is made."""
    cache, requests = requests_of(BATCHES["decode"], page_size, "cuda")
    table, out = cache.req_to_token.req_to_token, buffers(4, page_size, "cuda")
    batch = batch_of(cache, requests, BATCHES["decode"], decode=True)
    fill_metadata(out, batch, table, page_size)  # compiles
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_synchronisation():
        fill_metadata(out, batch, table, page_size)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
