"""`jax`: JAX reads the torch KV cache in place (DLPack) and computes with XLA, one program a shape bucket.

Legend: T query tokens, B requests, P pages, H query heads, K KV heads, D head dim, V value head dim, N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.errors import ConfigError
from fa_research.interop.dlpack import (
    HandleCache,
    is_aligned,
    reasons_against_jax,
    to_jax,
    to_torch,
    x64_enabled,
)
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities, GraphSupport

if TYPE_CHECKING:
    import jax

_TILE = 32  # queries a tile of an extend pass
_KERNELS = ("auto", "xla", "pallas")


@dataclass(frozen=True, slots=True)
class _Plan:
    """Metadata of one pass as JAX arrays, padded to their buckets; they serve every layer."""

    page_table_BP: jax.Array
    cache_seqlens_B: jax.Array
    cu_seqlens_q_B1: jax.Array


class JaxBackend(AttentionBackend):
    """Keys and values are shared once per pool and passed to the compiled program as arguments, queries and metadata
    are shared anew: that also orders JAX behind torch's stream, and the result orders torch behind JAX
    (`interop.dlpack`). Masks are evaluated by their own predicate. XLA runs outside torch's streams, so a step cannot
    be captured.

    `backend.options.kernel` says what computes passes of one token a request: `auto` (the default: our Pallas kernel
    on a GPU for the specs that it can run, else XLA), `xla`, or `pallas` (interpreted on the CPU; a spec it cannot run
    is refused). XLA computes all other passes. The row's notes say which it was, and why."""

    name = "jax"
    option_names = frozenset({"kernel"})

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        self._kernel = settings.options.get("kernel", "auto")
        super().__init__(settings, specs)
        if self._kernel not in _KERNELS:
            raise ConfigError(
                f"backend.options.kernel={self._kernel} is unknown; choose one of {', '.join(_KERNELS)}"
            )
        self.handles = HandleCache()

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        return reasons_against_jax(settings.device)

    @property
    def capabilities(self) -> Capabilities:
        dtypes = {"float16", "bfloat16", "float32"}
        return Capabilities(
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset(dtypes | {"float64"} if x64_enabled() else dtypes),
            mask_features=frozenset({"predicate"}),
            own_v_head_dim=True,
            softcap=True,
            sinks=True,
            returns_lse=True,
            cuda_graph=GraphSupport.NEVER,
        )

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering, s, reasons = super().lower(spec), self.settings, []
        if s.dtype is torch.float64 and not x64_enabled():
            reasons.append("JAX has 64-bit types only with JAX_ENABLE_X64=1 in the environment")
        if s.num_splits:
            reasons.append(f"backend.num_splits={s.num_splits}: XLA splits as it likes; use 0")
        if s.deterministic:
            reasons.append("backend.deterministic=true: XLA's order of summation goes by the batch's bucket")
        if self._kernel == "pallas":
            asked = "backend.options.kernel=pallas"
            reasons += [f"{asked}: {reason}; use auto or xla" for reason in _reasons_against_pallas(spec, s)]
        return replace(lowering, reasons=lowering.reasons + tuple(reasons))

    @property
    def notes(self) -> tuple[str, ...]:
        """What computes the decode passes of its layers."""
        said = dict.fromkeys(self._choose(lowering.spec) for lowering in self.lowerings)
        return tuple(
            f"backend=jax: one token a request by {kernel}, other passes by xla ({because})"
            for kernel, because in said
        )

    def _choose(self, spec: AttentionSpec) -> tuple[str, str]:
        """The kernel of decode passes and why it was taken."""
        if self._kernel != "auto":
            return self._kernel, "as asked"
        if self.settings.device.type != "cuda":
            return "xla", "pallas is interpreted off the GPU"
        reasons = _reasons_against_pallas(spec, self.settings)
        if reasons:
            return "xla", f"not pallas: {', '.join(reasons)}"
        return "pallas", "on a GPU"

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        if self.name not in metadata.plans:  # the same for every kind of layer
            metadata.plans[self.name] = _share_metadata(metadata)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        q_THD, metadata, spec, sinks_H = call.q_THD, call.metadata, call.spec, call.sinks_H
        plan: _Plan = metadata.plans[self.name]
        k_RKD, first_row = self._pool(call.k_cache_NKD)
        v_RKV, v_first_row = self._pool(call.v_cache_NKV)
        assert first_row == v_first_row, "keys and values of one layer lie at the same slots"
        tokens, one_each = q_THD.shape[0], metadata.q_len == 1
        q = to_jax(_pad_queries(q_THD, bucket(tokens)))
        arrays = (q, k_RKD, v_RKV, first_row, plan.page_table_BP, plan.cache_seqlens_B)
        if sinks_H is not None and not is_aligned(sinks_H):
            sinks_H = sinks_H.clone()
        sinks = None if sinks_H is None else self.handles.get(sinks_H)
        shape = {"page_size": metadata.page_size, "scale": spec.scale, "softcap": spec.softcap}
        if one_each and self._choose(spec)[0] == "pallas":
            out, lse = self._decode(arrays, sinks, spec, shape)
        else:
            from fa_research.kernels.jax_paged import paged_attention

            tile = 1 if one_each else _TILE
            out, lse = paged_attention(
                *arrays, plan.cu_seqlens_q_B1, sinks, mask=spec.mask, tile=tile, **shape
            )
        return to_torch(out)[:tokens], to_torch(lse)[:tokens] if call.return_lse else None

    def _decode(self, arrays: tuple[Any, ...], sinks: Any, spec: AttentionSpec, shape: dict[str, Any]) -> Any:
        from fa_research.kernels.pallas_decode import paged_decode

        band = spec.mask.band()
        assert band is not None, "lowering admits bands only"
        interpret = self.settings.device.type == "cpu"
        return paged_decode(
            *arrays, sinks, window=band.window, chunk=band.chunk, interpret=interpret, **shape
        )

    def _pool(self, cache_NKD: Tensor) -> tuple[jax.Array, int]:
        """The buffer of all layers that this layer's cache is a view of, as rows, and the layer's first row: one handle
        and one program serve every layer, and a layer needs no alignment of its own."""
        row = cache_NKD.stride(0)
        whole = cache_NKD if cache_NKD._base is None else cache_NKD._base
        offset = cache_NKD.storage_offset() - whole.storage_offset()
        if whole.is_contiguous() and cache_NKD.is_contiguous() and not (offset % row or whole.numel() % row):
            return self.handles.get(whole.view(-1, *cache_NKD.shape[1:])), offset // row
        return self.handles.get(cache_NKD), 0


def _reasons_against_pallas(spec: AttentionSpec, settings: BackendSettings) -> list[str]:
    reasons, dim = [], spec.head_dim
    if spec.mask.band() is None:
        reasons.append(f"mask {spec.mask.name} is no band, and the kernel evaluates bands only")
    if dim != spec.v_head_dim or not 16 <= dim <= 256 or dim & (dim - 1):
        reasons.append(f"head dims {dim}, {spec.v_head_dim}: takes one of 16, 32, 64, 128, 256")
    if settings.device.type == "cuda":
        if settings.dtype not in (torch.float16, torch.bfloat16):
            reasons.append("takes float16, bfloat16 on a GPU")
        major, minor = _capability(settings.device)
        if major < 8:
            reasons.append(f"needs compute capability 8.0, this GPU has {major}.{minor}")
    return reasons


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def bucket(size: int) -> int:
    """The next power of two: programs are compiled for these sizes only."""
    return 1 << max(size - 1, 0).bit_length()


def _pad_queries(q_THD: Tensor, size: int) -> Tensor:
    """In memory that JAX can read: the queries themselves where they are of that size and lie so."""
    if q_THD.shape[0] == size and q_THD.is_contiguous() and is_aligned(q_THD):
        return q_THD
    padded = q_THD.new_zeros(size, *q_THD.shape[1:])
    padded[: q_THD.shape[0]] = q_THD
    return padded


def _share_metadata(metadata: FlashAttentionMetadata) -> _Plan:
    """Padded requests have no tokens and no queries. The copies stay as they are when the static buffers of the next
    step are written."""
    batch, pages = metadata.page_table_BP.shape
    more, more_pages = bucket(batch) - batch, bucket(pages) - pages
    cu_seqlens = metadata.cu_seqlens_q_B1
    shared: list[Any] = [
        to_jax(tensor.contiguous())
        for tensor in (
            pad(metadata.page_table_BP, (0, more_pages, 0, more)),
            pad(metadata.cache_seqlens_int32_B, (0, more)),
            torch.cat([cu_seqlens, cu_seqlens[-1:].expand(more)]),
        )
    ]
    return _Plan(*shared)
