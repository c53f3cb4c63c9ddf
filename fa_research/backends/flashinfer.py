"""`flashinfer`: FlashInfer's paged wrappers (Ye et al. 2025), planned on the host before each pass, as SGLang and vLLM
use them.

Decode takes the kernels for CUDA cores, or, where many query heads share a KV head, those for tensor cores; both split
the keys. Extends take FlashInfer's FA3 kernels on Hopper and its FA2 kernels elsewhere. A captured step holds the
kernels alone: plans and page lists go to buffers that stay.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim (the same), N slots, S slots in a page,
P pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.backends.flashinfer_plans import Partials, Staging, cumulative, paged_rows
from fa_research.backends.flashinfer_support import (
    import_flashinfer,
    installed_version,
    on_hopper,
    read_options,
    reasons_unavailable,
)
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities

_CUDA_CORE_GROUPS = frozenset({1, 2, 3, 4, 8})  # query heads a KV head that the kernels are compiled for
_TENSOR_CORE_GROUP = 4  # from here on tensor cores are faster (SGLang's rule)
_DECODE_PLANS, _DECODE_PLAN_BYTES = 32, 1 << 20
_EXTEND_PLANS, _EXTEND_PLAN_BYTES = 4, 8 << 20


class FlashInferBackend(AttentionBackend):
    """Options: `implementation` (auto, fa2, fa3: kernels of extends), `tensor_cores` (auto, true, false: of decode)."""

    name = "flashinfer"
    option_names = frozenset({"implementation", "tensor_cores"})
    combine_kernels: ClassVar[tuple[str, ...]] = ("MergeStates",)

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        self._asked, self._asked_tensor_cores = read_options(settings)
        self._one_split = settings.deterministic or settings.num_splits == 1
        super().__init__(settings, specs)
        self._eager: dict[Any, Any] = {}  # wrappers of eager passes, by kind of layer

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        return reasons_unavailable(settings)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"float16", "bfloat16"}),
            mask_features=frozenset({"causal", "full", "window"}),
            head_dims=frozenset({64, 128, 256}),
            softcap=True,
            # `sinks` of its wrappers reaches kernels for Blackwell alone, the others ignore it.
            sinks=False,
            returns_lse=True,
            host_planning=True,
        )

    @property
    def provider(self) -> str:
        return "flashinfer"

    @property
    def notes(self) -> tuple[str, ...]:
        specs = [lowering.spec for lowering in self.lowerings]
        cores = sorted({"tensor" if self._tensor_cores(spec) else "CUDA" for spec in specs})
        decode = f"decode on {' and '.join(cores)} cores"
        return (f"flashinfer {installed_version()}: extends by {self._extends_by}, {decode}",)

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering = super().lower(spec)
        return replace(lowering, reasons=lowering.reasons + tuple(self._reasons(spec)))

    def _reasons(self, spec: AttentionSpec) -> Iterator[str]:
        if self.settings.num_splits > 1:
            yield (
                f"backend.num_splits={self.settings.num_splits}: it chooses splits when it plans; use 0, or 1 for none"
            )
        if self.settings.deterministic and self._extends_by == "fa2":
            yield (
                "backend.deterministic=true: its FA2 kernels cut queries by the batch's average length; its FA3 "
                "kernels (Hopper, backend.options.implementation=fa3) do not"
            )
        if self._asked_tensor_cores is False:
            group = spec.num_heads // spec.num_kv_heads
            if group not in _CUDA_CORE_GROUPS:
                yield f"backend.options.tensor_cores=false: {group} query heads a KV head need tensor cores"
            if self._one_split:
                yield "backend.options.tensor_cores=false: its kernels for CUDA cores always split; leave it out"

    @property
    def _extends_by(self) -> str:
        if self._asked != "auto":
            return self._asked
        return "fa3" if on_hopper(self.settings.device) else "fa2"

    def _tensor_cores(self, spec: AttentionSpec) -> bool:
        if self._asked_tensor_cores is not None:
            return self._asked_tensor_cores
        group = spec.num_heads // spec.num_kv_heads
        return self._one_split or group >= _TENSOR_CORE_GROUP or group not in _CUDA_CORE_GROUPS

    @cached_property
    def _flashinfer(self) -> Any:
        return import_flashinfer()

    @cached_property
    def _partials(self) -> Partials:
        return Partials(self.settings.device)

    @cached_property
    def _decode_staging(self) -> Staging:
        return Staging(_DECODE_PLANS, _DECODE_PLAN_BYTES, self.settings.device)

    @cached_property
    def _extend_staging(self) -> Staging:
        return Staging(_EXTEND_PLANS, _EXTEND_PLAN_BYTES, self.settings.device)

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        wrappers = self._eager if metadata.kept is None else metadata.kept
        decode = metadata.q_len == 1
        key = (decode, lowering)  # layers of one spec may differ in how they are rewritten
        if key not in wrappers:
            make = self._decode_wrapper if decode else self._extend_wrapper
            with torch.inference_mode(False):  # passes in that mode plan with it, and passes outside
                wrappers[key] = make(metadata, lowering.spec)
        plan = self._plan_decode if decode else self._plan_extend
        plan(wrappers[key], metadata, lowering.spec)
        metadata.plans[lowering.spec] = wrappers[key]

    def _decode_wrapper(self, metadata: FlashAttentionMetadata, spec: AttentionSpec) -> Any:
        captured = metadata.kept is not None
        tile = 16 if spec.num_heads // spec.num_kv_heads <= 16 else 128
        partials = self._partials.of(spec, tile, metadata.batch_size if captured else 0)
        rows = paged_rows(metadata)
        buffers: dict[str, Any] = {}
        if captured:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": rows.indptr_B1,
                "paged_kv_indices_buffer": rows.indices,
                "paged_kv_last_page_len_buffer": rows.last_page_len_B,
            }
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            partials, "NHD", use_tensor_cores=self._tensor_cores(spec), backend="fa2", **buffers
        )
        plan_memory = torch.zeros(_DECODE_PLAN_BYTES, dtype=torch.uint8, device=self.settings.device)
        wrapper.reset_workspace_buffer(partials, plan_memory)
        return wrapper

    def _plan_decode(self, wrapper: Any, metadata: FlashAttentionMetadata, spec: AttentionSpec) -> None:
        rows = paged_rows(metadata)
        replanned = metadata.kept is not None and getattr(wrapper, "_plan_info", None) is not None
        # Of a captured step `paged_rows` has filled the buffers already, so the second plan copies nothing there.
        plan = self._flashinfer.fast_decode_plan if replanned else type(wrapper).plan
        # Without splits, a captured step runs what its plan memory holds past the batch; zeros repeat request 0.
        with self._decode_staging.lent_to(wrapper, cleared=self._one_split):
            plan(
                wrapper,
                rows.indptr_cpu,
                rows.indices,
                rows.last_page_len_cpu,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                metadata.page_size,
                **self._variant(spec),
            )

    def _extend_wrapper(self, metadata: FlashAttentionMetadata, spec: AttentionSpec) -> Any:
        assert metadata.kept is None, "captured passes are decode steps"
        partials = self._partials.of(spec, tile=128)
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(partials, "NHD", backend=self._extends_by)

    def _plan_extend(self, wrapper: Any, metadata: FlashAttentionMetadata, spec: AttentionSpec) -> None:
        rows, band = paged_rows(metadata), spec.mask.band()
        assert band is not None
        with self._extend_staging.lent_to(wrapper):
            wrapper.plan(
                cumulative(metadata.extend_seq_lens_cpu),
                rows.indptr_cpu,
                rows.indices,
                rows.last_page_len_cpu,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                metadata.page_size,
                causal=band.causal,
                max_token_per_sequence=metadata.max_seq_len_q,
                **self._variant(spec),
            )

    def _variant(self, spec: AttentionSpec) -> dict[str, Any]:
        band = spec.mask.band()
        assert band is not None, "lowering admits bands only"
        return {
            "window_left": band.window - 1 if band.window else -1,  # keys before the query's own
            "logits_soft_cap": spec.softcap,
            "sm_scale": spec.scale,
            "q_data_type": self.settings.dtype,
            "kv_data_type": self.settings.dtype,
            "disable_split_kv": self._one_split,
        }

    def attend(self, call: AttentionCall) -> AttentionOutput:
        assert call.sinks_H is None, "lowering applies sinks afterwards"
        q_THD, out_THV = call.q_THD, call.out_THV
        if out_THV is None:
            out_THV = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        wrapper = call.metadata.plans[call.spec]
        result = wrapper.run(q_THD, call.pages(), out=out_THV, return_lse=call.return_lse)
        return (out_THV, natural(result[1])) if call.return_lse else (out_THV, None)


def natural(lse_TH: Tensor) -> Tensor:
    """FlashInfer's LSE, a logarithm in base 2, as a natural one, in place."""
    return lse_TH.mul_(math.log(2.0))
