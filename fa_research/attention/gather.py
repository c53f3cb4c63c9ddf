"""`backend.options.gather`: each request's pages are copied into one contiguous buffer before every layer's attention,
which then needs no page table, as engines without a paged kernel do. It is here to be measured against.

Buffers are as large as the batch can be, so that a captured decode step keeps them: B times the longest length.

Legend: B requests, N slots, G tokens of the buffers, K KV heads, D head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fa_research.errors import ConfigError
from fa_research.kernels.gather import gather_kv
from fa_research.metadata import FlashAttentionMetadata

OPTION = "gather"
_TAIL = 256  # zeros behind the last request: kernels load whole tiles of keys, and weigh what is past the end by zero
_ROW_MULTIPLE = 1024  # lengths of rows; a kernel is compiled for each


def asked(options: Mapping[str, Any]) -> bool:
    """What `backend.options.gather` says. Raises ConfigError for other than true and false."""
    value = options.get(OPTION, False)
    if not isinstance(value, bool):
        raise ConfigError(f"backend.options.{OPTION}={value}: must be true or false")
    return value


def packed(
    k_cache_NKD: Tensor, v_cache_NKV: Tensor, metadata: FlashAttentionMetadata
) -> tuple[Tensor, Tensor]:
    """K [G, K, D] and V [G, K, V] of the requests' tokens, one request after the other as `cu_seqlens_k_B1` counts."""
    count = metadata.batch_size * metadata.max_seq_len_k + _TAIL
    return _copied(k_cache_NKD, v_cache_NKV, metadata, metadata.cu_seqlens_k_B1, count, _TAIL)


def plan_rows(metadata: FlashAttentionMetadata) -> FlashAttentionMetadata:
    """Metadata in which each request has one page of its own, as long as the longest request may be; its
    `plans[OPTION]` is where each of them begins."""
    size = -(-max(metadata.max_seq_len_k, 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    row_B1 = torch.arange(metadata.batch_size + 1, dtype=torch.int32, device=metadata.page_table_BP.device)
    return replace(metadata, page_table_BP=row_B1[:-1, None], page_size=size, plans={OPTION: row_B1 * size})


def in_rows(
    k_cache_NKD: Tensor, v_cache_NKV: Tensor, metadata: FlashAttentionMetadata, rows: FlashAttentionMetadata
) -> tuple[Tensor, Tensor]:
    """K [G, K, D] and V [G, K, V] of the requests' tokens, each from the beginning of its page in `rows`."""
    count = metadata.batch_size * rows.page_size
    return _copied(k_cache_NKD, v_cache_NKV, metadata, rows.plans[OPTION], count, 0)


def _copied(
    k_cache_NKD: Tensor,
    v_cache_NKV: Tensor,
    metadata: FlashAttentionMetadata,
    starts_B1: Tensor,
    count: int,
    tail: int,
) -> tuple[Tensor, Tensor]:
    k_GKD = k_cache_NKD.new_empty(count, *k_cache_NKD.shape[1:])
    v_GKV = v_cache_NKV.new_empty(count, *v_cache_NKV.shape[1:])
    gather_kv(
        k_cache_NKD,
        v_cache_NKV,
        metadata.page_table_BP,
        metadata.cache_seqlens_int32_B,
        starts_B1,
        metadata.page_size,
        k_GKD,
        v_GKV,
        tail,
    )
    return k_GKD, v_GKV
