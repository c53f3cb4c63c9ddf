"""`triton`: our own kernels. Split-KV paged decode with a combine pass, ragged paged extend, both GQA-packed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fa_research.attention import gather
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities


class TritonBackend(AttentionBackend):
    """Any GPU that Triton supports; without one, the Triton interpreter on the CPU (slow, for correctness only)."""

    name = "triton"
    combine_kernels = ("_combine_kernel",)
    option_names = frozenset({gather.OPTION})

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        self._gathers = gather.asked(settings.options)
        super().__init__(settings, specs)

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append('the triton package is not installed (pip install -e ".[triton]")')
        if settings.device.type == "cpu" and not _interpreted():
            if torch.cuda.is_available():
                reasons.append(
                    "device=cpu on a machine with a GPU needs TRITON_INTERPRET=1 in the environment"
                )
            else:
                given = os.environ.get("TRITON_INTERPRET")
                reasons.append(
                    "on the CPU it runs in Triton's interpreter, which the environment turns off "
                    f"(TRITON_INTERPRET={given}): leave that variable out or set it to 1"
                )
        return tuple(reasons)

    @property
    def capabilities(self) -> Capabilities:
        dtypes = {"float16", "float32"}
        if self.settings.device.type != "cpu":  # the interpreter's bfloat16 is silently wrong
            dtypes.add("bfloat16")
        return Capabilities(
            devices=frozenset({"cuda", "cpu"}),
            dtypes=frozenset(dtypes),
            mask_features=frozenset({"causal", "full", "window", "chunk"}),
            head_dims=frozenset(range(8, 257, 8)),  # the kernels pad them to powers of two
            softcap=True,
            sinks=True,
            returns_lse=True,
        )

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        if self._gathers and gather.OPTION not in metadata.plans:
            metadata.plans[gather.OPTION] = gather.plan_rows(metadata)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        # A deterministic extend takes one kernel, whether requests gain one token each or many: their neighbours must
        # not show. So what counts is the kind of pass, not how many tokens it happens to have.
        decode = call.metadata.q_len == 1
        keys = self._keys(call)
        return self._decode(call, *keys) if decode else self._extend(call, *keys)

    def _keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, FlashAttentionMetadata]:
        """Where the kernels find keys and values: in the pages, or, gathered, in one long page a request."""
        if not self._gathers:
            return call.k_cache_NKD, call.v_cache_NKV, call.metadata
        rows: FlashAttentionMetadata = call.metadata.plans[gather.OPTION]
        return *gather.in_rows(call.k_cache_NKD, call.v_cache_NKV, call.metadata, rows), rows

    def _decode(
        self, call: AttentionCall, k_NKD: Tensor, v_NKV: Tensor, metadata: FlashAttentionMetadata
    ) -> AttentionOutput:
        from fa_research.kernels.paged_decode import paged_decode

        return paged_decode(
            call.q_THD,
            k_NKD,
            v_NKV,
            metadata.page_table_BP,
            metadata.cache_seqlens_int32_B,
            max_seq_len_k=metadata.max_seq_len_k,
            num_splits=self.settings.num_splits,
            deterministic=self.settings.deterministic,
            **_arguments(call, metadata),
        )

    def _extend(
        self, call: AttentionCall, k_NKD: Tensor, v_NKV: Tensor, metadata: FlashAttentionMetadata
    ) -> AttentionOutput:
        from fa_research.kernels.paged_extend import paged_extend

        band = call.spec.mask.band()
        return paged_extend(
            call.q_THD,
            k_NKD,
            v_NKV,
            metadata.page_table_BP,
            metadata.cache_seqlens_int32_B,
            metadata.cu_seqlens_q_B1,
            max_seq_len_q=metadata.max_seq_len_q,
            max_seq_len_k=metadata.max_seq_len_k,
            causal=band is None or band.causal,
            **_arguments(call, metadata),
        )


def _arguments(call: AttentionCall, metadata: FlashAttentionMetadata) -> dict[str, Any]:
    """What both kernels take; `metadata` is that of the keys, which may be gathered."""
    band = call.spec.mask.band()
    assert band is not None, "lowering admits bands only"
    return {
        "page_size": metadata.page_size,
        "scale": call.spec.scale,
        "softcap": call.spec.softcap,
        "window": band.window,
        "chunk": band.chunk,
        "sinks_H": call.sinks_H,
        "return_lse": call.return_lse,
        "out": call.out_THV,
    }


def _interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them, by its own reading of the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}
