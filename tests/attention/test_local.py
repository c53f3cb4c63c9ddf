"""Chunked attention as virtual requests: which slots each query would read, against the mask's own predicate."""

from __future__ import annotations

import pytest
import torch

from fa_research.attention.local import chunk_metadata
from fa_research.batch import ForwardBatch, extend_batch
from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.masks import Chunked
from fa_research.metadata import FlashAttentionMetadata, fill_metadata
from tests.helpers import age, decode_batch, make_cache, slots_of, tokens

# (chunk, page size): equal, several pages a chunk, one slot a page, no power of two.
SIZES = [(8, 1), (8, 8), (16, 4), (12, 3), (128, 128), (256, 128), (1, 1)]


def lens_around(chunk: int) -> list[tuple[int, int]]:
    """(prefix, new): queries that begin and end on, before and after chunk borders, and one that spans several."""
    c = chunk
    return [
        (0, 1),
        (0, c),
        (0, c + 1),
        (c, 1),
        (c - 1, 1),
        (c - 1, 2),
        (c, c),
        (c // 2, 3 * c),
        (2 * c - 1, c + 2),
    ]


def requests_of(
    chunk: int, page_size: int, lens: list[tuple[int, int]]
) -> tuple[PagedKVCache, list[CachedRequest]]:
    longest = max(map(sum, lens))
    pages = sum(-(-sum(pair) // page_size) for pair in lens) + 3
    cache = make_cache(pages, page_size, max_requests=len(lens) + 2, max_context_len=longest + 1)
    age(cache, seed=chunk + page_size)
    requests = [cache.open() for _ in lens]
    cache.extend(requests, [prefix for prefix, _ in lens])
    cache.extend(requests, [new for _, new in lens])
    return cache, requests


def build(cache: PagedKVCache, batch: ForwardBatch) -> FlashAttentionMetadata:
    size = cache.page_size
    metadata = FlashAttentionMetadata.allocate(batch.batch_size, batch.max_seq_len_k, size, "cpu")
    fill_metadata(metadata, batch, cache.req_to_token.req_to_token, size)
    return metadata


def slots_read(metadata: FlashAttentionMetadata) -> list[list[int]]:
    """For each query, the slots that causal attention over these requests reads."""
    size, reads = metadata.page_size, []
    cu_q = metadata.cu_seqlens_q_B1.tolist()
    for b, length in enumerate(metadata.cache_seqlens_int32_B.tolist()):
        pages = metadata.page_table_BP[b].tolist()
        count = cu_q[b + 1] - cu_q[b]
        for last in range(length - count, length):
            reads.append([pages[j // size] * size + j % size for j in range(last + 1)])
    return reads


def slots_allowed(cache: PagedKVCache, request: CachedRequest, position: int, mask: Chunked) -> list[int]:
    slots = slots_of(cache, request, position + 1)
    return [slot for j, slot in enumerate(slots) if mask.allows(position, j)]


@pytest.mark.parametrize(("chunk", "page_size"), SIZES)
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_each_query_reads_the_slots_that_its_mask_allows(chunk: int, page_size: int, decode: bool) -> None:
    lens = [(p + n - 1, 1) if decode else (p, n) for p, n in lens_around(chunk)]
    cache, requests = requests_of(chunk, page_size, lens)
    table, rows = cache.req_to_token.req_to_token, [request.row for request in requests]
    prefixes, new = [p for p, _ in lens], [n for _, n in lens]
    if decode:
        batch = decode_batch(table, rows, prefixes, cache.req_to_token.max_context_len)
    else:
        batch = extend_batch(table, rows, prefixes, tokens(new))
    virtual = chunk_metadata(build(cache, batch), batch, chunk)
    expected = [
        slots_allowed(cache, request, position, Chunked(chunk))
        for request, (prefix, count) in zip(requests, lens, strict=True)
        for position in range(prefix, prefix + count)
    ]
    assert slots_read(virtual) == expected
    check_host_numbers(virtual, chunk)
    ids = virtual.page_table_BP
    assert ids.min() >= 0 and ids.max() <= cache.allocator.num_pages


def check_host_numbers(metadata: FlashAttentionMetadata, chunk: int) -> None:
    """Bounds hold (kernels size their grids by them), and cumulative lengths agree with the lengths."""
    lens = metadata.cache_seqlens_int32_B
    assert lens.max() <= metadata.max_seq_len_k <= chunk
    assert metadata.cu_seqlens_q_B1.diff().max() <= metadata.max_seq_len_q
    assert metadata.cu_seqlens_k_B1.tolist() == [0, *lens.cumsum(0).tolist()]
    assert metadata.page_table_BP.shape[1] * metadata.page_size >= lens.max()
    dtypes = {
        x.dtype for x in (lens, metadata.cu_seqlens_q_B1, metadata.cu_seqlens_k_B1, metadata.page_table_BP)
    }
    assert dtypes == {torch.int32}


def test_decode_keeps_one_request_a_query_and_reads_no_length_on_the_host() -> None:
    """A decode batch knows no length on the host; a captured step must still find each chunk's first page."""
    cache, requests = requests_of(8, 4, [(20, 1), (7, 1), (8, 1)])
    batch = decode_batch(cache.req_to_token.req_to_token, [r.row for r in requests], [20, 7, 8], 22)
    assert batch.seq_lens_cpu == () and batch.extend_seq_lens_cpu == ()
    virtual = chunk_metadata(build(cache, batch), batch, 8)
    assert virtual.batch_size == 3 and virtual.max_seq_len_q == 1
    assert virtual.cache_seqlens_int32_B.tolist() == [5, 8, 1]


def test_a_padded_entry_reads_page_0_alone() -> None:
    cache, requests = requests_of(8, 4, [(20, 1)])
    batch = decode_batch(cache.req_to_token.req_to_token, [requests[0].row, 0, 0], [20, 1, 1], 22)
    virtual = chunk_metadata(build(cache, batch), batch, 8)
    assert virtual.cache_seqlens_int32_B.tolist() == [5, 1, 1]
    assert slots_read(virtual)[1:] == [[0], [0]]


def test_a_chunk_off_page_borders_is_a_bug_of_the_caller() -> None:
    cache, requests = requests_of(8, 4, [(3, 2)])
    batch = extend_batch(cache.req_to_token.req_to_token, [requests[0].row], [3], tokens([2]))
    with pytest.raises(AssertionError):
        chunk_metadata(build(cache, batch), batch, 6)
