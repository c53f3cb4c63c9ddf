"""Chunked local attention as causal attention over virtual requests (as SGLang and vLLM serve Llama 4).

A request's queries are cut at chunk borders; each piece becomes a request of its own, whose keys begin at the chunk's
first page. Borders come from the mask, tables are counted in pages, and decode asks nothing of the host.

Legend: B requests, X virtual requests, P pages.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.metadata import FlashAttentionMetadata


def chunk_metadata(
    metadata: FlashAttentionMetadata, batch: ForwardBatch, chunk: int
) -> FlashAttentionMetadata:
    """The same queries over virtual requests of at most `chunk` keys; `chunk` is a multiple of the page size."""
    assert chunk % metadata.page_size == 0
    if batch.mode is ForwardMode.DECODE:
        return _decode(metadata, chunk)
    return _extend(metadata, batch, chunk)


def _decode(metadata: FlashAttentionMetadata, chunk: int) -> FlashAttentionMetadata:
    lens_B = metadata.cache_seqlens_int32_B
    start_B = (lens_B - 1).clamp(min=0) // chunk * chunk
    max_len = min(chunk, metadata.max_seq_len_k)
    table_BP = _slice_table(
        metadata.page_table_BP, start_B // metadata.page_size, max_len, metadata.page_size
    )
    cut = _build(metadata, lens_B - start_B, metadata.cu_seqlens_q_B1, table_BP, 1, max_len)
    cut.q_len = metadata.q_len
    cut.seq_lens_cpu = tuple(n - max(n - 1, 0) // chunk * chunk for n in metadata.seq_lens_cpu)
    return cut


def _extend(metadata: FlashAttentionMetadata, batch: ForwardBatch, chunk: int) -> FlashAttentionMetadata:
    device = metadata.page_table_BP.device
    pieces = _pieces(batch.seq_lens_cpu, batch.extend_seq_lens_cpu, chunk)
    columns = list(zip(*pieces, strict=True))
    staging = torch.tensor(columns, dtype=torch.int32, pin_memory=device.type == "cuda")
    owner_X, start_X, len_X, queries_X = staging.to(device, non_blocking=True)
    cu_seqlens_q = torch.nn.functional.pad(queries_X.cumsum(0, dtype=torch.int32), (1, 0))
    max_len = max(columns[2])
    table_XP = metadata.page_table_BP[owner_X]
    table_XP = _slice_table(table_XP, start_X // metadata.page_size, max_len, metadata.page_size)
    cut = _build(metadata, len_X, cu_seqlens_q, table_XP, max(columns[3]), max_len)
    cut.seq_lens_cpu, cut.extend_seq_lens_cpu = columns[2:]
    return cut


def _pieces(
    seq_lens: tuple[int, ...], extend_lens: tuple[int, ...], chunk: int
) -> Iterator[tuple[int, int, int, int]]:
    """(request, first key, number of keys, number of queries) for each piece, in query order."""
    for owner, (seq_len, extend_len) in enumerate(zip(seq_lens, extend_lens, strict=True)):
        position = seq_len - extend_len
        while position < seq_len:
            start = position // chunk * chunk
            end = min(start + chunk, seq_len)
            yield owner, start, end - start, end - position
            position = end


def _slice_table(table: Tensor, first_page: Tensor, max_len: int, page_size: int) -> Tensor:
    """For each row, the pages from `first_page` on, as many as `max_len` slots may need (repeating the last column past
    the table's end, where no length reaches)."""
    width = -(-max_len // page_size)
    columns = first_page[:, None] + torch.arange(width, device=table.device, dtype=torch.int32)
    return torch.gather(table, 1, columns.clamp(max=table.shape[1] - 1).long())


def _build(
    parent: FlashAttentionMetadata, lens: Tensor, cu_seqlens_q: Tensor, table: Tensor, max_q: int, max_k: int
) -> FlashAttentionMetadata:
    cu_seqlens_k = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    return FlashAttentionMetadata(lens, cu_seqlens_q, cu_seqlens_k, table, parent.page_size, max_q, max_k)
