"""Which queries and which pages belong together: the tiles and block lists that `flex` gives FlexAttention.

All of it is computed on the device from a pass's metadata, with shapes that the host knows.

Legend: T query tokens, B requests, P pages of a table row, N pages of the pool, I tiles, R queries in a tile, W pages
listed for a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fa_research.masks import Mask
from fa_research.metadata import FlashAttentionMetadata

TILE = 128  # queries a tile of an extend pass; below 128 Flex would take its decode kernel


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the queries of a pass are cut; the same for every layer.

    request_I: whose queries. first_I: position of the first. token_IR: the query token of each row (rows past a
    request's end hold any), row_T: where each token's result lies. Both None in a decode pass: tile i is token i.
    logical_BN: for each request, the place of a page of the pool among its own, -1 for those of others."""

    request_I: Tensor
    first_I: Tensor
    last_I: Tensor
    token_IR: Tensor | None
    row_T: Tensor | None
    logical_BN: Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Pages listed for each tile: those whose keys the predicate must judge, and those that are seen as a whole (None:
    all are judged)."""

    num_partial_I: Tensor
    partial_IW: Tensor
    num_full_I: Tensor | None = None
    full_IW: Tensor | None = None


def cut(metadata: FlashAttentionMetadata, num_tokens: int, num_slots: int) -> Tiles:
    """The tiles of a pass; their number goes by the host's numbers alone, so tiles may be left without a query."""
    lens_B, cu_q = metadata.cache_seqlens_int32_B, metadata.cu_seqlens_q_B1
    batch_size, device = metadata.batch_size, lens_B.device
    logical_BN = _logical_pages(metadata, num_slots // metadata.page_size)
    if metadata.q_len == 1:
        every_B = torch.arange(batch_size, dtype=torch.int32, device=device)
        return Tiles(every_B, lens_B - 1, lens_B - 1, None, None, logical_BN)
    q_lens_B = cu_q.diff()
    tiles_B = (q_lens_B + TILE - 1) // TILE
    end_B = tiles_B.cumsum(0, dtype=torch.int32)
    tile_I = torch.arange(_rounded(num_tokens // TILE + batch_size), dtype=torch.int32, device=device)
    request_I = torch.searchsorted(end_B, tile_I, right=True, out_int32=True).clamp(max=batch_size - 1)
    offset_I = (tile_I - (end_B - tiles_B)[request_I]) * TILE
    first_I = (lens_B - q_lens_B)[request_I] + offset_I
    row_R = torch.arange(TILE, dtype=torch.int32, device=device)
    token_IR = (cu_q[request_I] + offset_I)[:, None] + row_R
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=device)
    # Tokens behind the last cumulative length are padding: theirs is some row.
    of_T = torch.searchsorted(cu_q[1:], token_T, right=True, out_int32=True).clamp(max=batch_size - 1)
    row_T = (end_B - tiles_B)[of_T] * TILE + token_T - cu_q[of_T]
    last_I = torch.minimum(first_I + TILE, lens_B[request_I]) - 1
    return Tiles(request_I, first_I, last_I, token_IR.clamp(max=num_tokens - 1), row_T, logical_BN)


def _logical_pages(metadata: FlashAttentionMetadata, num_pages: int) -> Tensor:
    """[B, pages of the pool]: the inverse of the page table."""
    lens_B, table_BP = metadata.cache_seqlens_int32_B, metadata.page_table_BP
    column_P = torch.arange(table_BP.shape[1], dtype=torch.int32, device=table_BP.device)
    # Behind a request's last page the table holds what was there before: that goes to a column of its own.
    own_BP = column_P * metadata.page_size < lens_B[:, None]
    page_BP = torch.where(own_BP, table_BP, num_pages).long()
    logical = torch.full((table_BP.shape[0], num_pages + 1), -1, dtype=torch.int32, device=table_BP.device)
    return logical.scatter_(1, page_BP, column_P.expand_as(page_BP))


def list_pages(metadata: FlashAttentionMetadata, tiles: Tiles, mask: Mask) -> Blocks:
    """The pages of each tile that hold a key it may see. Where the mask is a band, those seen as a whole are listed
    apart: Flex asks no mask there. Not in decode passes, where it would then split the whole pool and not the list."""
    page_size, decode = metadata.page_size, tiles.row_T is None
    len_I = metadata.cache_seqlens_int32_B[tiles.request_I]
    len_I = torch.where(tiles.first_I < len_I, len_I, 0)  # tiles without a query see nothing
    width = _rounded(metadata.page_table_BP.shape[1])
    column_W = torch.arange(width, dtype=torch.int32, device=len_I.device)

    def listed(column_IW: Tensor) -> Tensor:
        column_IW = column_IW.clamp(max=metadata.page_table_BP.shape[1] - 1)
        return metadata.page_table_BP[tiles.request_I[:, None], column_IW]

    begin_I, end_I, whole_from_I, whole_to_I = _extent(tiles, len_I, mask)
    first, stop = begin_I // page_size, (end_I + page_size - 1) // page_size
    if mask.band() is None or decode:
        return Blocks((stop - first).clamp(min=0), listed(first[:, None] + column_W))
    full_from = ((whole_from_I + page_size - 1) // page_size).clamp(min=first)
    full_to = (whole_to_I // page_size).clamp(min=full_from)
    before, full = full_from - first, full_to - full_from
    after_IW = torch.where(column_W < before[:, None], first[:, None], full_to[:, None] - before[:, None])
    return Blocks(
        (stop - first - full).clamp(min=0),
        listed(after_IW + column_W),
        full,
        listed(full_from[:, None] + column_W),
    )


def _extent(tiles: Tiles, len_I: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys that some query of the tile sees lie in [0, 1), keys between [2, 3) are seen by all of them."""
    band, zero = mask.band(), torch.zeros_like(len_I)
    first, last = tiles.first_I, tiles.last_I
    if band is None:
        return zero, len_I, zero, zero
    begin, whole_from = zero, zero
    if band.window:
        begin, whole_from = first - band.window + 1, last - band.window + 1
    if band.chunk:
        begin = torch.maximum(begin, first // band.chunk * band.chunk)
        whole_from = torch.maximum(whole_from, last // band.chunk * band.chunk)
    end = torch.minimum(len_I, last + 1) if band.causal else len_I
    whole_to = torch.minimum(len_I, first + 1) if band.causal else len_I
    return begin.clamp(min=0), end, whole_from.clamp(min=0), whole_to


def _rounded(count: int) -> int:
    """The next number of at most three binary digits, so that few sizes are compiled."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step
