"""`fa3`: FlashAttention-3 on Hopper (Shah et al. 2024), as SGLang's Flash Attention backend uses it."""

from __future__ import annotations

import torch

from fa_research.backends.devices import reasons_against_hopper
from fa_research.backends.flash_attn import FlashAttnBackend
from fa_research.spec import Capabilities


class FA3Backend(FlashAttnBackend):
    """Any page size; the tile schedule is computed once per pass and serves every layer."""

    name = "fa3"
    version = 3

    @classmethod
    def device_reasons(cls, device: torch.device) -> tuple[str, ...]:
        return reasons_against_hopper(device)

    @property
    def capabilities(self) -> Capabilities:
        chunk = {"chunk"} if self._kernels.chunk else set()
        return Capabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"float16", "bfloat16"}),
            mask_features=frozenset({"causal", "full", "window"} | chunk),
            head_dims=frozenset({64, 96, 128, 192, 256}),  # those that the packages compile kernels for
            page_size_multiple=self.page_size_multiple,
            softcap=True,
            sinks=self.settings.dtype in self._kernels.sinks,
            returns_lse=True,
        )
