"""What every variant of `measure.py` computes: one batch, and how its outputs are checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fa_research.attention.reference import paged_attention as definition
from fa_research.interop.dlpack import to_jax
from fa_research.measure.numerics import judge_rows
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec

HEADS, KV_HEADS, DIM, PAGE_SIZE = 32, 8, 128, 16


@dataclass
class Scene:
    """One batch: queries, pools of one layer, metadata."""

    q_BHD: Tensor
    k_NKD: Tensor
    v_NKD: Tensor
    metadata: FlashAttentionMetadata
    spec: AttentionSpec

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> Scene:
        generator = torch.Generator(device=device).manual_seed(0)
        pages = -(-length // PAGE_SIZE)
        slots = (batch * pages + 1) * PAGE_SIZE

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        metadata = FlashAttentionMetadata.allocate(batch, length, PAGE_SIZE, device)
        order = torch.randperm(batch * pages, generator=generator, device=device) + 1
        metadata.page_table_BP.copy_(order.view(batch, pages))
        metadata.cache_seqlens_int32_B.fill_(length)
        metadata.cu_seqlens_q_B1.copy_(torch.arange(batch + 1))
        metadata.cu_seqlens_k_B1.copy_(torch.arange(batch + 1) * length)
        metadata.max_seq_len_q, metadata.max_seq_len_k = 1, length
        spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM, DIM**-0.5)
        pools = normal(slots, KV_HEADS, DIM), normal(slots, KV_HEADS, DIM)
        return cls(normal(batch, HEADS, DIM), *pools, metadata, spec)

    @property
    def bytes_read(self) -> int:
        return 2 * int(self.metadata.cu_seqlens_k_B1[-1]) * KV_HEADS * DIM * self.q_BHD.element_size()

    def check(self, out_BHD: Tensor, requests: int = 4) -> dict[str, float | bool]:
        """The first requests against float64, and the bound of `measure.numerics`."""
        m, n = self.metadata, min(requests, self.q_BHD.shape[0])
        lens = m.cache_seqlens_int32_B[:n].tolist()
        pools = (self.k_NKD, self.v_NKD, m.page_table_BP[:n])
        exact, low = (
            definition(self.q_BHD[:n], *pools, lens, [1] * n, PAGE_SIZE, self.spec, compute_dtype=dtype)[0]
            for dtype in (torch.float64, self.q_BHD.dtype)
        )
        verdict = judge_rows([(out_BHD[:n].flatten(0, 1), low.flatten(0, 1), exact.flatten(0, 1))])
        return verdict.checks("out")

    def arrays(self) -> dict[str, Any]:
        m = self.metadata
        tensors = {"q": self.q_BHD, "k": self.k_NKD, "v": self.v_NKD, "table": m.page_table_BP}
        return {name: to_jax(x) for name, x in (tensors | {"lens": m.cache_seqlens_int32_B}).items()}
