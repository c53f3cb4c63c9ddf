"""`fa2`: FlashAttention-2 (Dao 2023) over a page table; Ampere and newer."""

from __future__ import annotations

import torch

from fa_research.backends.devices import reasons_against_ampere
from fa_research.backends.flash_attn import FlashAttnBackend
from fa_research.spec import Capabilities


class FA2Backend(FlashAttnBackend):
    """Page sizes are multiples of 16 (vLLM's build) or 256 (flash-attn's). Sinks go through the LSE epilogue, chunks
    through virtual requests."""

    name = "fa2"
    version = 2
    reads_cu_seqlens_k = True

    @classmethod
    def device_reasons(cls, device: torch.device) -> tuple[str, ...]:
        return reasons_against_ampere(device)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"float16", "bfloat16"}),
            mask_features=frozenset({"causal", "full", "window"}),
            head_dims=frozenset({64, 96, 128, 192, 256}),  # those that the packages compile kernels for
            page_size_multiple=self.page_size_multiple,
            softcap=True,
            returns_lse=True,
        )
