"""`triton`: our own kernels. Split-KV paged decode with a combine pass, ragged paged extend, both GQA-packed."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities


class TritonBackend(AttentionBackend):
    """Any GPU that Triton supports; without one, the Triton interpreter on the CPU (slow, for correctness only)."""

    name = "triton"

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("the triton package is not installed (pip install 'fa_research[triton]')")
        if settings.device.type == "cpu" and torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append("device=cpu on a machine with a GPU needs TRITON_INTERPRET=1 in the environment")
        return tuple(reasons)

    @classmethod
    def speed_rank(cls, device: torch.device) -> int:
        return 20 if device.type == "cuda" else -1

    @property
    def capabilities(self) -> Capabilities:
        dtypes = {"float16", "float32"}
        if self.settings.device.type != "cpu":  # the interpreter's bfloat16 is silently wrong
            dtypes.add("bfloat16")
        return Capabilities(
            devices=frozenset({"cuda", "cpu"}),
            dtypes=frozenset(dtypes),
            mask_features=frozenset({"causal", "full", "window", "chunk"}),
            head_dims=frozenset({64, 128, 256}),
            softcap=True,
            sinks=True,
            returns_lse=True,
        )

    def attend(
        self,
        q_THD: Tensor,
        k_cache_NKD: Tensor,
        v_cache_NKV: Tensor,
        metadata: FlashAttentionMetadata,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        band = spec.mask.band()
        assert band is not None
        common = {
            "page_size": metadata.page_size,
            "max_seq_len_k": metadata.max_seq_len_k,
            "scale": spec.scale,
            "softcap": spec.softcap,
            "window": band.window,
            "chunk": band.chunk,
            "sinks_H": sinks_H,
            "return_lse": return_lse,
        }
        pages = (metadata.page_table_BP, metadata.cache_seqlens_int32_B)
        if metadata.max_seq_len_q == 1:
            from fa_research.kernels.paged_decode import paged_decode

            splits = {"num_splits": self.settings.num_splits, "deterministic": self.settings.deterministic}
            return paged_decode(q_THD, k_cache_NKD, v_cache_NKV, *pages, **common, **splits)
        from fa_research.kernels.paged_extend import paged_extend

        ragged = {"max_seq_len_q": metadata.max_seq_len_q, "causal": band.causal}
        return paged_extend(q_THD, k_cache_NKD, v_cache_NKV, *pages, metadata.cu_seqlens_q_B1, **common, **ragged)
