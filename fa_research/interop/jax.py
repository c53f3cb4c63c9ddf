"""Our paged attention for JAX: `paged_attention` on JAX arrays, also inside `jax.jit`, served by any of our backends.

Shape suffixes: T query tokens, B requests, B1 = B + 1, H query heads, K KV heads, D head dim, V value head dim, P pages
(of the pool, or of a request in the page table), S slots in a page, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fa_research import backends
from fa_research.attention.merge import apply_sinks
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.errors import InteropError
from fa_research.interop import ffi
from fa_research.interop.checks import check, check_arguments
from fa_research.interop.dlpack import import_jax
from fa_research.interop.replay import Replays
from fa_research.masks import Causal, Mask
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, GraphSupport

if TYPE_CHECKING:
    import jax


def paged_attention(
    q_THD: jax.Array,
    k_PSKD: jax.Array,
    v_PSKV: jax.Array,
    page_table_BP: jax.Array,
    cache_seqlens_B: jax.Array,
    cu_seqlens_q_B1: jax.Array | None = None,
    *,
    backend: str = "auto",
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks_H: jax.Array | None = None,
    layer: int | jax.Array = 0,
    max_seq_len_q: int | None = None,
    max_seq_len_k: int | None = None,
    return_lse: bool = False,
    device: str | None = None,
) -> Any:
    """Attention of each request's last tokens to all its keys in the cache, the tokens' own among them.

    The pool is passed to the backend where it lies. Shapes are static, as always under `jax.jit`: pad requests with
    length 0 and no queries, tokens behind the last cumulative length, so that batches share programs. What padding
    tokens get is undefined.

    Args:
        q_THD: queries of all requests, one request after the other.
        k_PSKD, v_PSKV: the pool's pages, or [L, P, S, K, D] of all layers with `layer` (as `share_pool` has them). A
            slice of the latter inside jit would be a copy of the layer.
        page_table_BP, cache_seqlens_B: int32 page ids and lengths in tokens, those of q included.
        cu_seqlens_q_B1: int32 cumulative query lengths; None for decode, where each request has one query.
        backend: `auto`, `torch`, `triton`, `fa2`, `fa3`. mask: `fa_research.masks` (None: causal).
        scale: of q.k (None: 1 / sqrt(D)). softcap: 0 for none. sinks_H: one more logit a head, float32.
        max_seq_len_q, max_seq_len_k: bounds of the lengths; None: all of T, and as much as the page table holds.
        device: cpu or cuda; None: where q is, under jit JAX's default.

    Returns:
        out [T, H, V] in q's dtype; with `return_lse` also LSE [T, H] (float32, natural, without the sink).

    Raises InteropError for shapes and dtypes that do not fit and for `jax.vmap`, and what `backends.create` raises,
    when the call is traced; what goes wrong while the program runs is a JaxRuntimeError with the error's text.
    """
    jax = import_jax()
    jnp = jax.numpy
    k_PSKD, v_PSKV, page_table_BP = _one_layer(jax, k_PSKD, v_PSKV, page_table_BP, layer)
    decode = cu_seqlens_q_B1 is None
    if decode:
        check(
            q_THD.shape[0] == cache_seqlens_B.shape[0],
            f"cu_seqlens_q_B1=None means one query a request, there are {q_THD.shape[0]} queries and "
            f"{cache_seqlens_B.shape[0]} requests",
        )
        max_seq_len_q = 1
        cu_seqlens_q_B1 = np.arange(q_THD.shape[0] + 1, dtype=np.int32)
    check_arguments(q_THD, k_PSKD, v_PSKV, page_table_BP, cache_seqlens_B, cu_seqlens_q_B1, sinks_H)
    _, heads, head_dim = q_THD.shape
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=k_PSKD.shape[2],
        head_dim=head_dim,
        v_head_dim=v_PSKV.shape[3],
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        mask=mask or Causal(),
        has_sink=sinks_H is not None,
    )
    on = _torch_device(jax, q_THD, device)
    longest = max_seq_len_k or page_table_BP.shape[1] * k_PSKD.shape[1]
    settings = (on, getattr(torch, str(q_THD.dtype)), k_PSKD.shape[1], longest)
    serving = _backend(backend, *settings, spec)
    served = _Served(serving, decode, max_seq_len_q or q_THD.shape[0], longest, return_lse)
    arrays = [q_THD, k_PSKD, v_PSKV, page_table_BP, cache_seqlens_B]
    arrays += [] if decode else [cu_seqlens_q_B1]  # XLA would run a kernel to make a constant
    arrays += [] if sinks_H is None else [sinks_H]
    results = [jax.ShapeDtypeStruct((*q_THD.shape[:2], spec.v_head_dim), q_THD.dtype)]
    results += [jax.ShapeDtypeStruct(q_THD.shape[:2], jnp.float32)] if return_lse else []
    outs = _call(jax, served, on, results, arrays)
    return tuple(outs) if return_lse else outs[0]


def _call(jax: Any, served: _Served, on: torch.device, results: list[Any], arrays: list[Any]) -> Any:
    number = _call_number(served, on, tuple(map(_shape, arrays)), tuple(map(_shape, results)))

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return tuple(jax.ffi.ffi_call(ffi.TARGET, results)(*arrays, call=np.int64(number)))

    @call.def_vmap
    def refuse(*_: Any) -> Any:
        raise InteropError(
            "jax.vmap over paged_attention: requests are its batch already; put all of them into one ragged call "
            "(cu_seqlens_q_B1)"
        )

    return call(*arrays)


@dataclass(frozen=True, slots=True, eq=False)
class _Backend:
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
        lse = self.backend.attend_into(
            out_THV,
            q_THD,
            k_PSKD.flatten(0, 1),
            v_PSKV.flatten(0, 1),
            metadata,
            lowering.spec,
            sinks_H=None if late_sinks else sinks_H,
            return_lse=lse_TH is not None or late_sinks,
        )
        if late_sinks:
            assert lse is not None and sinks_H is not None
            out_THV.copy_(apply_sinks(out_THV, lse, sinks_H))
        if lse_TH is not None:
            assert lse is not None
            lse_TH[: lse.shape[0]].copy_(lse)


@dataclass(frozen=True, slots=True)
class _Served:
    """What a custom call runs. Calls that are equal share a number, and so the wrappers of their addresses."""

    backend: _Backend
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
        )
        sinks_H = rest[0] if rest else None
        lse_TH = outputs[1] if self.return_lse else None
        self.backend.attend(inputs[:3], metadata, sinks_H, outputs[0], lse_TH)


@cache
def _one_each(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device)


@cache
def _call_number(
    served: _Served, device: torch.device, inputs: tuple[ffi.Shape, ...], outputs: tuple[ffi.Shape, ...]
) -> int:
    # Lengths of a decode are read on the device, so that the graph of one call is the graph of all.
    can = served.backend.backend.capabilities
    captured = (
        served.max_seq_len_q == 1 and can.cuda_graph is not GraphSupport.NEVER and not can.host_planning
    )
    replays = Replays() if device.type == "cuda" and captured else None
    return ffi.add_call(ffi.Call(served, device, inputs, outputs, replays))


@cache
def _backend(
    name: str, device: torch.device, dtype: torch.dtype, page_size: int, longest: int, spec: AttentionSpec
) -> _Backend:
    if name == "jax":
        raise InteropError("backend=jax serves torch; from JAX take auto, torch, triton, fa2 or fa3")
    settings = BackendSettings(device, dtype, page_size, longest)
    if name == "auto":
        name, _ = backends.choose(settings, [spec])
    made = backends.create(name, settings, [spec])
    if made.capabilities.host_planning:
        raise InteropError(
            f"backend={name} plans on the host, which needs lengths that a JAX program has on the device alone; use "
            "backend=triton or fa3"
        )
    if made.lowerings[0].chunk:
        raise InteropError(
            f"mask chunked on backend={name}: its virtual requests need lengths on the host, which a JAX program has "
            "not; use backend=triton"
        )
    return _Backend(made)


def _one_layer(jax: Any, k: Any, v: Any, page_table_BP: Any, layer: Any) -> tuple[Any, Any, Any]:
    """The pools of all layers as one pool with more pages, where they come so."""
    if k.ndim != 5:
        check(isinstance(layer, int) and layer == 0, "layer: the pool has one layer, [P, S, K, D]")
        return k, v, page_table_BP
    pages = k.shape[1]
    flat = [x.reshape(-1, *x.shape[2:]) for x in (k, v)]
    return flat[0], flat[1], page_table_BP + jax.numpy.int32(layer) * pages


def _torch_device(jax: Any, q: Any, asked: str | None) -> torch.device:
    platform = asked
    if platform is None:
        concrete = not isinstance(q, jax.core.Tracer)
        platform = next(iter(q.devices())).platform if concrete else jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    check(platform in ("cpu", "cuda"), f"device={platform}: choose one of cpu, cuda")
    if platform == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InteropError(
            "paged_attention on JAX's GPU: torch sees no CUDA device; install a CUDA build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _shape(array: Any) -> ffi.Shape:
    return tuple(array.shape), getattr(torch, str(array.dtype))
