"""What `fa2` and `fa3` share: flash-attention kernels over a page table, from whichever package is installed.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, N slots, S slots in a page.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fa_research.attention import gather
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings, sinks_afterwards
from fa_research.backends.flash_attn_providers import KernelArguments, Provider, resolve
from fa_research.masks import Band
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec


class FlashAttnBackend(AttentionBackend):
    """The kernels index pages as [P, S, K, D]; the pool's buffers are viewed so without a copy."""

    takes_provider = True
    combine_kernels = ("combine", "Combine")
    option_names = frozenset({gather.OPTION})
    version: ClassVar[int]

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        provider, reasons = resolve(self.version, settings.provider)
        assert provider is not None, reasons
        self._kernels: Provider = provider(self.version)
        self._gathers = gather.asked(settings.options)
        super().__init__(settings, specs)

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        reasons = list(cls.device_reasons(settings.device))
        if not reasons:  # importing the kernels without a GPU says nothing useful
            reasons += resolve(cls.version, settings.provider)[1]
        return tuple(reasons)

    @classmethod
    @abstractmethod
    def device_reasons(cls, device: torch.device) -> tuple[str, ...]:
        """Why this device cannot run the kernels."""

    @property
    def provider(self) -> str:
        return self._kernels.module

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering, s = super().lower(spec), self.settings
        reasons = self._kernels.split_reasons(s.num_splits, s.deterministic)
        if not lowering.chunk:  # chunks that became requests have no window
            reasons += self._kernels.window_reasons(spec)
        if s.deterministic and s.num_splits > 1:
            reasons += (
                f"backend.num_splits={s.num_splits}: backend.deterministic=true takes one split; use 0",
            )
        if self._gathers and not self._kernels.gathers:
            reasons += (
                f"backend.options.{gather.OPTION}=true: {self.provider} is called with a page table alone; "
                "backend.provider=vllm.vllm_flash_attn takes packed keys too",
            )
        return replace(lowering, reasons=lowering.reasons + reasons)

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        spec = lowering.spec
        band = _band(spec)
        metadata.plans[spec] = self._kernels.schedule(
            metadata,
            None if self._gathers else metadata.page_size,
            num_heads_q=spec.num_heads,
            num_heads_kv=spec.num_kv_heads,
            headdim=spec.head_dim,
            headdim_v=spec.v_head_dim,
            qkv_dtype=self.settings.dtype,
            causal=band.causal,
            window_size=_window(band),
            has_softcap=spec.softcap > 0,
            num_splits=self._num_splits,
        )

    @property
    def page_size_multiple(self) -> int:
        """Pages that are gathered may be of any size."""
        return 1 if self._gathers else self._kernels.page_size_multiple[self.version]

    @property
    def _num_splits(self) -> int:
        # A fixed single split keeps a request's order of summation the same whatever the batch around it.
        return 1 if self.settings.deterministic else self.settings.num_splits

    def attend(self, call: AttentionCall) -> AttentionOutput:
        sinks_H, spec, metadata = call.sinks_H, call.spec, call.metadata
        if sinks_H is not None and (call.return_lse or sinks_H.dtype not in self._kernels.sinks):
            return sinks_afterwards(self, call)
        band = _band(spec)
        args = KernelArguments(
            scale=spec.scale,
            causal=band.causal,
            window=_window(band),
            chunk=band.chunk,
            softcap=spec.softcap,
            num_splits=self._num_splits,
            return_lse=call.return_lse,
            out=call.out_THV if self._kernels.takes_out else None,
            gathered=self._gathers,
        )
        if self._gathers:
            k, v = gather.packed(call.k_cache_NKD, call.v_cache_NKV, metadata)
        else:
            k, v = call.pages()
        return self._kernels.call(call.q_THD, k, v, metadata, args, metadata.plans.get(spec), sinks_H)


def _band(spec: AttentionSpec) -> Band:
    band = spec.mask.band()
    assert band is not None
    return band


def _window(band: Band) -> tuple[int, int]:
    # The kernels count keys to the left of the query, the query's own not included.
    return (band.window - 1, 0) if band.window else (-1, -1)
