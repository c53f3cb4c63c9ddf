"""`FlashAttentionMetadata`: what the attention kernels of every layer need to know of a batch, built once per
pass.

Legend: B requests, B1 = B + 1, P pages (width of the page table), R request rows, W table width in slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch
from fa_research.config.limits import require
from fa_research.kernels import ops


@dataclass(slots=True)
class FlashAttentionMetadata:
    """Int32 tensors on the device, and host numbers.

    cache_seqlens_int32_B: tokens in the cache per request, the new ones included. cu_seqlens_q_B1,
    cu_seqlens_k_B1: cumulative lengths. page_table_BP: page ids; entries past a request's pages are whatever
    was there before. q_len: query tokens of every request (1: a decode step), None in a ragged pass. seq_lens_cpu,
    extend_seq_lens_cpu: the host's copies, as in `ForwardBatch` (empty where only the device knows). plans: what a
    backend planned for this pass, by attention spec. kept: what a backend keeps from one pass to the next of a captured
    step, such as the buffers that its plans go to; None in an eager pass."""

    cache_seqlens_int32_B: Tensor
    cu_seqlens_q_B1: Tensor
    cu_seqlens_k_B1: Tensor
    page_table_BP: Tensor
    page_size: int
    max_seq_len_q: int = 1
    max_seq_len_k: int = 0
    q_len: int | None = None
    seq_lens_cpu: tuple[int, ...] = ()
    extend_seq_lens_cpu: tuple[int, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict)
    kept: dict[Any, Any] | None = None

    @property
    def batch_size(self) -> int:
        return self.cache_seqlens_int32_B.shape[0]

    @classmethod
    def allocate(
        cls, batch_size: int, max_seq_len_k: int, page_size: int, device: torch.device | str
    ) -> FlashAttentionMetadata:
        """Buffers for `batch_size` requests of up to `max_seq_len_k` tokens, zeroed: a page id that nobody
        wrote is the sink page, never out of the pool. Raises ConfigError for sizes that cannot be."""
        require({"batch_size": batch_size, "max_seq_len_k": max_seq_len_k}, least=0)
        require({"kv.page_size": page_size})

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        table = zeros(batch_size, -(-max_seq_len_k // page_size))
        return cls(zeros(batch_size), zeros(batch_size + 1), zeros(batch_size + 1), table, page_size)

    def copy_(self, other: FlashAttentionMetadata) -> None:
        """Take the numbers of `other`, which has the same shapes, in place."""
        for name in ("cache_seqlens_int32_B", "cu_seqlens_q_B1", "cu_seqlens_k_B1", "page_table_BP"):
            getattr(self, name).copy_(getattr(other, name))
        for name in ("max_seq_len_q", "max_seq_len_k", "q_len", "seq_lens_cpu", "extend_seq_lens_cpu"):
            setattr(self, name, getattr(other, name))
        self.plans.clear()

    def head(self, batch_size: int) -> FlashAttentionMetadata:
        """The first `batch_size` requests of the same buffers (one static set serves every captured batch
        size)."""
        return FlashAttentionMetadata(
            self.cache_seqlens_int32_B[:batch_size],
            self.cu_seqlens_q_B1[: batch_size + 1],
            self.cu_seqlens_k_B1[: batch_size + 1],
            self.page_table_BP[:batch_size],
            self.page_size,
        )


def fill_metadata(
    out: FlashAttentionMetadata, batch: ForwardBatch, req_to_token_RW: Tensor, page_size: int
) -> None:
    """Write the batch into `out`: one kernel on the GPU, no allocation, no host synchronisation. Eager passes
    call it on fresh buffers, captured passes on the static ones; there is no second version of this code."""
    assert out.batch_size == batch.batch_size and out.page_size == page_size
    assert out.page_table_BP.shape[1] * page_size >= batch.max_seq_len_k, (
        "the page table is narrower than the longest request"
    )
    ops.fill_metadata(
        req_to_token_RW,
        batch.req_pool_indices_B,
        batch.seq_lens_B,
        batch.extend_seq_lens_B,
        page_size,
        out.cache_seqlens_int32_B,
        out.cu_seqlens_q_B1,
        out.cu_seqlens_k_B1,
        out.page_table_BP,
    )
    out.max_seq_len_q = batch.max_seq_len_q
    out.max_seq_len_k = batch.max_seq_len_k
    out.q_len = batch.q_len
    out.seq_lens_cpu = batch.seq_lens_cpu
    out.extend_seq_lens_cpu = batch.extend_seq_lens_cpu
    out.plans.clear()
