"""`fa4`: FlashAttention-4, `flash_attn.cute` (flash-attn-4 4.0.0b20), on Hopper. Written for Blackwell in CuTe's DSL,
it has kernels for Hopper too, compiled at the first call of each kind.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, N slots, S slots in a page.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings, sinks_afterwards
from fa_research.backends.devices import reasons_against_hopper
from fa_research.spec import AttentionSpec, Capabilities

_TILE = 128  # keys a tile


class FA4Backend(AttentionBackend):
    """Pages of 128 slots come by TMA, those of any other size by cp.async, slot by slot. The Hopper kernels have one
    split, so that a request's result never depends on its neighbours, and small batches do not fill the GPU. What a
    call is compiled for (head dims, mask, softcap, whether pages are of 128 slots, whether there is an LSE) does not
    include lengths or batch size: what the warm-up of a capture compiles serves every replay."""

    name = "fa4"

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        module, reason = load()
        assert module is not None, reason
        self._kernels = module
        super().__init__(settings, specs)

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        if reasons := reasons_against_hopper(
            settings.device
        ):  # elsewhere other limits hold, and nobody has tried
            return reasons
        reason = load()[1]
        return () if reason is None else (reason,)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"float16", "bfloat16"}),
            mask_features=frozenset({"causal", "full", "window"}),
            # Above 128 a tile has 64 to 112 keys, and its loader of pages counts on whole multiples of 128.
            head_dims=frozenset({64, 96, 128}),
            softcap=True,
            sinks=self.settings.dtype is torch.bfloat16,  # the kernel takes them in bfloat16 alone
            returns_lse=True,
        )

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering, s, reasons = super().lower(spec), self.settings, []
        band = spec.mask.band()
        if s.num_splits > 1:
            reasons.append(
                f"backend.num_splits={s.num_splits}: its Hopper kernels have one split; use 0 or 1"
            )
        if band is not None and not band.causal and 64 < spec.head_dim <= 96:
            reasons.append(
                f"mask {spec.mask.name} with head dim {spec.head_dim}: its tile is 144 keys, of which its loader of "
                f"pages fills {_TILE}"
            )
        return replace(lowering, reasons=lowering.reasons + tuple(reasons))

    def attend(self, call: AttentionCall) -> AttentionOutput:
        sinks_H, spec, metadata = call.sinks_H, call.spec, call.metadata
        if sinks_H is not None and (call.return_lse or sinks_H.dtype is not torch.bfloat16):
            return sinks_afterwards(self, call)
        band = spec.mask.band()
        assert band is not None, "lowering admits bands only"
        out_THV, lse_HT = self._kernels.flash_attn_varlen_func(
            call.q_THD,
            *call.pages(),
            cu_seqlens_q=metadata.cu_seqlens_q_B1,
            max_seqlen_q=metadata.max_seq_len_q,
            max_seqlen_k=metadata.max_seq_len_k,
            seqused_k=metadata.cache_seqlens_int32_B,
            page_table=metadata.page_table_BP,
            softmax_scale=spec.scale,
            causal=band.causal,
            # Keys to the left of the query, its own not counted.
            window_size=(band.window - 1, 0) if band.window else (None, None),
            learnable_sink=sinks_H,
            softcap=spec.softcap,
            num_splits=1,  # 0 would let it choose splits that it then refuses
            return_lse=call.return_lse,
        )
        return out_THV, lse_HT.transpose(0, 1) if call.return_lse else None


# The DSL's word on the package's own kernels, at each one's compilation.
_NOISE: dict[str, type[Warning]] = {
    "Argument aux_data .* cannot be converted to a JitArgument": UserWarning,
    r"warpgroup\.OperandMajorMode is deprecated": DeprecationWarning,
}


@cache
def load() -> tuple[Any, str | None]:
    """`flash_attn.cute`, or None and why it cannot be had. Its import alone takes seconds."""
    for message, category in _NOISE.items():
        warnings.filterwarnings("ignore", message, category)
    try:
        with warnings.catch_warnings():  # of the packages that it imports
            warnings.simplefilter("ignore")
            return importlib.import_module("flash_attn.cute"), None
    except Exception as error:  # a broken binary raises ImportError, OSError, RuntimeError or worse
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f'flash_attn.cute: {said} (pip install -e ".[fa4]")'
