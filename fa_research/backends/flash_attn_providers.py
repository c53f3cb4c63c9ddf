"""Where the flash-attention kernels come from. Five packages ship them, each with a face of its own; a `Provider` makes
them one. Signatures were read from the packages named; an installed package that differs fails loudly in its call.

Legend: T query tokens, B requests, B1 = B + 1, P pages, S slots in a page, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.backends.flash_attn_provider import KernelArguments, Provider, WindowFault
from fa_research.metadata import FlashAttentionMetadata

__all__ = ["PROVIDERS", "KernelArguments", "Provider", "WindowFault", "resolve"]


class _WithKVCache(Provider):
    """Packages whose FA3 is `flash_attn_with_kvcache(..., page_table=, cache_seqlens=, cu_seqlens_q=)`."""

    versions = frozenset({3})

    def call(self, q_THD, k_PSKD, v_PSKV, metadata, args, schedule, sinks_H):  # type: ignore[no-untyped-def]
        extra: dict[str, Any] = {}
        if self.chunk and args.chunk:
            extra["attention_chunk"] = args.chunk
        if sinks_H is not None:
            extra["sinks"] = sinks_H
        if schedule is not None:
            extra["scheduler_metadata"] = schedule
        result = self._module.flash_attn_with_kvcache(
            q_THD,
            k_PSKD,
            v_PSKV,
            cache_seqlens=metadata.cache_seqlens_int32_B,
            page_table=metadata.page_table_BP,
            cu_seqlens_q=metadata.cu_seqlens_q_B1,
            max_seqlen_q=metadata.max_seq_len_q,
            softmax_scale=args.scale,
            causal=args.causal,
            window_size=args.window,
            softcap=args.softcap,
            num_splits=args.num_splits,
            return_softmax_lse=args.return_lse,
            **extra,
        )
        return (result[0], result[1].transpose(0, 1)) if args.return_lse else (result, None)


class Upstream(_WithKVCache):
    """`flash_attn_interface`, built from flash-attention's `hopper/` folder."""

    module = "flash_attn_interface"
    chunk = True


class SGLKernel(_WithKVCache):
    """`sgl_kernel.flash_attn`, SGLang's kernels."""

    module = "sgl_kernel.flash_attn"
    sinks = frozenset({torch.bfloat16})


class HubKernels(_WithKVCache):
    """The Hugging Face `kernels` hub: loads the published build of FA3 (needs a network once)."""

    module = "kernels"
    chunk = True
    repository: ClassVar[str] = "kernels-community/flash-attn3"

    def _load(self) -> Any:
        return importlib.import_module("kernels").get_kernel(self.repository)


class FlashAttn(Provider):
    """`flash_attn` 2.x: `flash_attn_varlen_func(..., block_table=)`, pages of a multiple of 256 slots."""

    module = "flash_attn"
    versions = frozenset({2})
    gathers = True

    def _load(self) -> Any:
        module = super()._load()
        if not hasattr(
            module, "flash_attn_varlen_func"
        ):  # FlashAttention-4 alone leaves a folder of that name
            raise ImportError("has no FlashAttention-2 in it (flash_attn.cute is FlashAttention-4)")
        return module

    def split_reasons(self, num_splits: int, deterministic: bool) -> tuple[str, ...]:
        reasons = []
        if num_splits > 0:
            reasons.append(f"backend.num_splits={num_splits}: {self.module} chooses the splits itself; use 0")
        if deterministic:
            reasons.append(
                f"backend.deterministic=true: {self.module} splits keys by the whole batch; "
                "backend.provider=vllm.vllm_flash_attn does not have to"
            )
        return tuple(reasons)

    def call(self, q_THD, k_PSKD, v_PSKV, metadata, args, schedule, sinks_H):  # type: ignore[no-untyped-def]
        result = self._module.flash_attn_varlen_func(
            q_THD,
            k_PSKD,
            v_PSKV,
            metadata.cu_seqlens_q_B1,
            metadata.cu_seqlens_k_B1,
            # At 1 it packs the query heads of a KV head as queries, and where it then takes one split its kernel writes
            # their LSE in the order [K, B, H / K], which is returned as [K, H / K, B] (vLLM's copy transposes it).
            # 2 is a bound as well and keeps it from packing: slower, so only where the LSE is wanted.
            max(metadata.max_seq_len_q, 2) if args.return_lse else metadata.max_seq_len_q,
            metadata.max_seq_len_k,
            softmax_scale=args.scale,
            causal=args.causal,
            window_size=args.window,
            softcap=args.softcap,
            return_attn_probs=args.return_lse,
            block_table=None if args.gathered else metadata.page_table_BP,
        )
        return (result[0], result[1].transpose(0, 1)) if args.return_lse else (result, None)


class VLLM(Provider):
    """`vllm.vllm_flash_attn`: FA2 with pages of a multiple of 16 slots, FA3 with sinks and without chunks."""

    module = "vllm.vllm_flash_attn"
    versions = frozenset({2, 3})
    sinks = frozenset({torch.bfloat16})
    takes_out = True
    gathers = True
    page_size_multiple = {2: 16, 3: 1}
    window_fault = WindowFault({96: (192, 128), 128: (128, 128), 192: (128, 96), 256: (128, 64)})

    def _load(self) -> Any:
        module = importlib.import_module(f"{self.module}.flash_attn_interface")
        if not getattr(module, f"FA{self.version}_AVAILABLE"):
            raise ImportError(getattr(module, f"FA{self.version}_UNAVAILABLE_REASON"))
        return module

    def split_reasons(self, num_splits: int, deterministic: bool) -> tuple[str, ...]:
        if self.version == 2 and num_splits > 1:
            return (f"backend.num_splits={num_splits}: FA2 of {self.module} takes 0 (its own choice) or 1",)
        return ()

    def schedule(
        self, metadata: FlashAttentionMetadata, page_size: int | None, **shape: Any
    ) -> Tensor | None:
        if self.version != 3:
            return None
        result: Tensor = self._module.get_scheduler_metadata(
            batch_size=metadata.batch_size,
            max_seqlen_q=metadata.max_seq_len_q,
            max_seqlen_k=metadata.max_seq_len_k,
            cache_seqlens=metadata.cache_seqlens_int32_B,
            cu_seqlens_q=metadata.cu_seqlens_q_B1,
            page_size=page_size,
            **shape,
        )
        return result

    def call(self, q_THD, k_PSKD, v_PSKV, metadata, args, schedule, sinks_H):  # type: ignore[no-untyped-def]
        result = self._module.flash_attn_varlen_func(
            q_THD,
            k_PSKD,
            v_PSKV,
            max_seqlen_q=metadata.max_seq_len_q,
            cu_seqlens_q=metadata.cu_seqlens_q_B1,
            max_seqlen_k=metadata.max_seq_len_k,
            seqused_k=None if args.gathered else metadata.cache_seqlens_int32_B,
            cu_seqlens_k=metadata.cu_seqlens_k_B1 if args.gathered else None,
            softmax_scale=args.scale,
            causal=args.causal,
            window_size=list(args.window),
            softcap=args.softcap,
            block_table=None if args.gathered else metadata.page_table_BP,
            return_softmax_lse=args.return_lse,
            scheduler_metadata=schedule,
            num_splits=args.num_splits,
            fa_version=self.version,
            s_aux=sinks_H,
            out=args.out,
        )
        return (result[0], result[1].transpose(0, 1)) if args.return_lse else (result, None)


PROVIDERS: tuple[type[Provider], ...] = (Upstream, FlashAttn, SGLKernel, VLLM, HubKernels)


@cache
def resolve(version: int, pinned: str | None) -> tuple[type[Provider] | None, tuple[str, ...]]:
    """The first installed provider of FA`version` (or the pinned one), or None and why each was passed over."""
    candidates = [p for p in PROVIDERS if version in p.versions and pinned in (None, p.module)]
    if not candidates:
        names = ", ".join(p.module for p in PROVIDERS if version in p.versions)
        return None, (f"backend.provider={pinned} is unknown for FA{version}; choose one of {names}",)
    reasons = []
    for provider in candidates:
        reason = provider.missing(version)
        if reason is None:
            return provider, ()
        reasons.append(reason)
    return None, tuple(reasons)
