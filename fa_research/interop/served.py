"""What a custom call of JAX runs: one of our backends, on tensors over XLA's memory.

Shape suffixes: T query tokens, B requests, B1 = B + 1, H query heads, V value head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fa_research import backends
from fa_research.attention.call import AttentionCall
from fa_research.attention.merge import apply_sinks
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.backends.contract import checked
from fa_research.errors import InteropError
from fa_research.interop import ffi
from fa_research.interop.replay import Replays
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, GraphSupport


@dataclass(frozen=True, slots=True, eq=False)
class SharedBackend:
    """A backend for one layer, as JAX calls share it."""

    backend: AttentionBackend

    def attend(
        self,
        tensors: Sequence[Tensor],
        metadata: FlashAttentionMetadata,
        sinks_H: Tensor | None,
        out_THV: Tensor,
        lse_TH: Tensor | None,
    ) -> None:
        """Attention into the outputs; LSE where there is a place for it."""
        q_THD, k_PSKD, v_PSKV = tensors
        (lowering,) = self.backend.lowerings
        late_sinks = sinks_H is not None and lowering.sink_epilogue
        self.backend.plan(metadata, lowering)
        caches = (k_PSKD.flatten(0, 1), v_PSKV.flatten(0, 1))
        sinks = None if late_sinks else sinks_H
        return_lse = lse_TH is not None or late_sinks
        call = AttentionCall(q_THD, *caches, metadata, lowering.spec, sinks, return_lse, out_THV)
        out, lse = checked(self.backend.attend(call), call, self.backend.name, padded=True)
        if late_sinks:
            assert lse is not None and sinks_H is not None
            out = apply_sinks(out, lse, sinks_H)
        if out.data_ptr() != out_THV.data_ptr():
            out_THV[: out.shape[0]].copy_(out)  # tokens past the last cumulative length are padding
        if lse_TH is not None:
            assert lse is not None
            lse_TH[: lse.shape[0]].copy_(lse)


@dataclass(frozen=True, slots=True)
class Served:
    """What a custom call runs. Calls that are equal share a number, and so the wrappers of their addresses."""

    backend: SharedBackend
    decode: bool  # one query a request, and no cumulative lengths among the inputs
    max_seq_len_q: int
    max_seq_len_k: int
    return_lse: bool

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        table_BP, seqlens_B, *rest = inputs[3:]
        cu_seqlens_q_B1 = _one_each(len(seqlens_B), seqlens_B.device) if self.decode else rest.pop(0)
        cu_seqlens_k_B1 = seqlens_B.new_empty(len(seqlens_B) + 1, device="meta")  # hardly any kernel reads it
        if self.backend.backend.reads_cu_seqlens_k:
            cu_seqlens_k_B1 = pad(seqlens_B.cumsum(0, dtype=torch.int32), (1, 0))
        metadata = FlashAttentionMetadata(
            seqlens_B,
            cu_seqlens_q_B1,
            cu_seqlens_k_B1,
            table_BP,
            inputs[1].shape[1],
            self.max_seq_len_q,
            self.max_seq_len_k,
            q_len=1 if self.decode else None,
        )
        sinks_H = rest[0] if rest else None
        lse_TH = outputs[1] if self.return_lse else None
        self.backend.attend(inputs[:3], metadata, sinks_H, outputs[0], lse_TH)


@cache
def _one_each(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device)


@cache
def call_number(
    served: Served, device: torch.device, inputs: tuple[ffi.Shape, ...], outputs: tuple[ffi.Shape, ...]
) -> int:
    # Lengths of a decode are read on the device, so that the graph of one call is the graph of all.
    can = served.backend.backend.capabilities
    captured = served.decode and can.cuda_graph is not GraphSupport.NEVER and not can.host_planning
    replays = Replays() if device.type == "cuda" and captured else None
    return ffi.add_call(ffi.Call(served, device, inputs, outputs, replays))


@cache
def shared_backend(
    name: str, device: torch.device, dtype: torch.dtype, page_size: int, longest: int, spec: AttentionSpec
) -> SharedBackend:
    if name == "jax":
        raise InteropError(
            "backend=jax serves torch; from JAX take auto, torch, triton, flex, fa2, fa3 or fa4"
        )
    settings = BackendSettings(device, dtype, page_size, longest)

    if name == "auto":
        return SharedBackend(backends.choose(settings, [spec], also=_reasons_from_jax)[0])
    made = backends.create(name, settings, [spec])
    if reasons := _reasons_from_jax(made):
        raise InteropError(f"backend={name} {'; '.join(reasons)}; use backend=triton")
    return SharedBackend(made)


def _reasons_from_jax(made: AttentionBackend) -> tuple[str, ...]:
    """Why a backend that could run the layer cannot from a JAX program, which has lengths on the device alone."""
    reasons = []
    if made.capabilities.host_planning:
        reasons.append("plans on the host, which needs lengths that a JAX program has on the device alone")
    if made.lowerings[0].chunk:
        reasons.append(
            "runs mask chunked as virtual requests, which need lengths that a JAX program has on the device alone"
        )
    return tuple(reasons)
