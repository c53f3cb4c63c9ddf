"""Our paged attention for JAX: `paged_attention` on JAX arrays, also inside `jax.jit`, served by any of our backends.

Shape suffixes: T query tokens, B requests, B1 = B + 1, H query heads, K KV heads, D head dim, V value head dim, P pages
(of the pool, or of a request in the page table), S slots in a page, L layers.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fa_research.errors import InteropError
from fa_research.interop import ffi
from fa_research.interop.checks import (
    bound,
    check,
    check_arguments,
    check_arrays,
    number,
    torch_dtype,
)
from fa_research.interop.dlpack import import_jax
from fa_research.interop.served import Served, call_number, shared_backend
from fa_research.masks import Causal, Mask
from fa_research.spec import AttentionSpec

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
    device: str | torch.device | None = None,
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
        backend: `auto`, or any but `jax` and `flashinfer`. mask: `fa_research.masks` (None: causal).
        scale: of q.k (None: 1 / sqrt(D)). softcap: 0 for none. sinks_H: one more logit a head, float32.
        max_seq_len_q, max_seq_len_k: bounds of the lengths; None: all of T, and as much as the page table holds.
        device: cpu or cuda; None: where q is, under jit JAX's default.
        Numbers are part of the compiled program: Python's, or arrays that are known when it is traced.

    Returns:
        out [T, H, V] in q's dtype; with `return_lse` also LSE [T, H] (float32, natural, without the sink).

    Arrays are on one device: those of several are refused where that is seen, and under jit, where it is not, XLA would
    gather them, the pool too; use it within `jax.shard_map`.

    Raises InteropError for arguments that do not fit, for `jax.vmap` and for derivatives, and what `backends.create`
    raises, when the call is traced; what goes wrong while the program runs is a JaxRuntimeError (outside jit at times a
    ValueError) with the error's text.
    """
    jax = import_jax()
    check_arrays(
        {
            "q_THD": q_THD, "k_PSKD": k_PSKD, "v_PSKV": v_PSKV, "page_table_BP": page_table_BP,
            "cache_seqlens_B": cache_seqlens_B, "cu_seqlens_q_B1": cu_seqlens_q_B1, "sinks_H": sinks_H,
        }
    )  # fmt: skip
    k_PSKD, v_PSKV, page_table_BP = _one_layer(jax, k_PSKD, v_PSKV, page_table_BP, layer)
    decode = cu_seqlens_q_B1 is None
    if decode:
        cu_seqlens_q_B1 = _one_query_each(q_THD, cache_seqlens_B)
    check_arguments(q_THD, k_PSKD, v_PSKV, page_table_BP, cache_seqlens_B, cu_seqlens_q_B1, sinks_H)
    spec = _spec(q_THD, k_PSKD, v_PSKV, mask or Causal(), scale, softcap, sinks_H is not None)
    on = _torch_device(jax, q_THD, device)
    longest = bound("max_seq_len_k", max_seq_len_k) or page_table_BP.shape[1] * k_PSKD.shape[1]
    settings = (on, torch_dtype("q_THD", q_THD), k_PSKD.shape[1], longest)
    serving = shared_backend(backend, *settings, spec)
    # At a bound of 1 kernels take the query at i to be that of request i; some requests may have none here.
    longest_q = 1 if decode else max(bound("max_seq_len_q", max_seq_len_q) or q_THD.shape[0], 2)
    served = Served(serving, decode, longest_q, longest, return_lse)
    arrays = [q_THD, k_PSKD, v_PSKV, page_table_BP, cache_seqlens_B]
    arrays += [] if decode else [cu_seqlens_q_B1]  # XLA would run a kernel to make a constant
    arrays += [] if sinks_H is None else [sinks_H]
    results = [jax.ShapeDtypeStruct((*q_THD.shape[:2], spec.v_head_dim), q_THD.dtype)]
    results += [jax.ShapeDtypeStruct(q_THD.shape[:2], jax.numpy.float32)] if return_lse else []
    outs = _call(jax, served, on, results, arrays)
    return tuple(outs) if return_lse else outs[0]


def _spec(
    q_THD: Any, k_PSKD: Any, v_PSKV: Any, mask: Mask, scale: float | None, softcap: float, has_sink: bool
) -> AttentionSpec:
    _, heads, head_dim = q_THD.shape
    check(isinstance(mask, Mask), f"mask={mask!r}: has to be one of fa_research.masks, such as Causal()")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=k_PSKD.shape[2],
        head_dim=head_dim,
        v_head_dim=v_PSKV.shape[3],
        scale=head_dim**-0.5 if scale is None else number("scale", scale, float),
        softcap=number("softcap", softcap, float),
        mask=mask,
        has_sink=has_sink,
    )


def _call(jax: Any, served: Served, on: torch.device, results: list[Any], arrays: list[Any]) -> Any:
    number = call_number(served, on, tuple(map(_shape, arrays)), tuple(map(_shape, results)))

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return tuple(jax.ffi.ffi_call(ffi.TARGET, results)(*arrays, call=np.int64(number)))

    @call.def_vmap
    def refuse(*_: Any) -> Any:
        raise InteropError(
            "jax.vmap over paged_attention: requests are its batch already; put all of them into one ragged call "
            "(cu_seqlens_q_B1)"
        )

    differentiable = jax.custom_jvp(call)

    @differentiable.defjvp
    def refuse_derivatives(*_: Any) -> Any:
        raise InteropError("jax.grad through paged_attention: it is for inference and has no derivative")

    return differentiable(*arrays)


def _one_query_each(q_THD: Any, cache_seqlens_B: Any) -> np.ndarray:
    """Cumulative query lengths of decode, [B + 1]."""
    queries, requests = q_THD.shape[0], cache_seqlens_B.shape[0]
    said = (
        f"cu_seqlens_q_B1=None means one query a request, there are {queries} queries and {requests} requests"
    )
    check(queries == requests, said)
    return np.arange(queries + 1, dtype=np.int32)


def _one_layer(jax: Any, k: Any, v: Any, page_table_BP: Any, layer: Any) -> tuple[Any, Any, Any]:
    """The pools of all layers as one pool with more pages, where they come so."""
    layers, pages = k.shape[:2] if k.ndim == 5 else (1, 0)
    if k.ndim != 5 or not isinstance(layer, jax.core.Tracer):  # one that is traced is the caller's word
        layer = number("layer", layer, operator.index)
        check(0 <= layer < layers, f"layer={layer}: the pool has layers 0 to {layers - 1}")
    if k.ndim != 5:
        return k, v, page_table_BP
    flat = [x.reshape(-1, *x.shape[2:]) for x in (k, v)]
    return flat[0], flat[1], page_table_BP + jax.numpy.int32(layer) * pages


def _torch_device(jax: Any, q: Any, asked: str | torch.device | None) -> torch.device:
    platform = asked.type if isinstance(asked, torch.device) else asked
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
    return tuple(array.shape), torch_dtype("an array", array)
