"""`torch`: gathers pages and evaluates the mask predicate. Any device, any dtype; the oracle of every other backend."""

from __future__ import annotations

from dataclasses import replace

import torch

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.attention.reference import paged_attention
from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities, GraphSupport


class TorchBackend(AttentionBackend):
    """Computes in float32, or in float64 where the inputs are. It reads the lengths on the host once per pass, so it
    cannot be captured in a CUDA graph."""

    name = "torch"

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        return ()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
            own_kv_dtype=True,
            mask_features=frozenset({"predicate"}),
            own_v_head_dim=True,
            softcap=True,
            sinks=True,
            returns_lse=True,
            cuda_graph=GraphSupport.NEVER,
        )

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering, splits = super().lower(spec), self.settings.num_splits
        if splits == 0:
            return lowering
        reason = f"backend.num_splits={splits}: the definition has no splits; use 0"
        return replace(lowering, reasons=(*lowering.reasons, reason))

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        self._lengths(metadata)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        metadata, dtype = call.metadata, call.q_THD.dtype
        out, lse = paged_attention(
            call.q_THD,
            call.k_cache_NKD,
            call.v_cache_NKV,
            metadata.page_table_BP,
            *self._lengths(metadata),
            metadata.page_size,
            call.spec,
            sinks_H=call.sinks_H,
            compute_dtype=torch.promote_types(dtype, torch.float32),
        )
        return out.to(dtype), lse.float() if call.return_lse else None

    def _lengths(self, metadata: FlashAttentionMetadata) -> tuple[list[int], list[int]]:
        if "lengths" not in metadata.plans:
            extend_lens = metadata.cu_seqlens_q_B1.diff().tolist()
            metadata.plans["lengths"] = metadata.cache_seqlens_int32_B.tolist(), extend_lens
        lengths: tuple[list[int], list[int]] = metadata.plans["lengths"]
        return lengths
