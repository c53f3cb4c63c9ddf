"""Pools, weights and metadata on both sides, without a copy. Torch writes the cache, JAX only reads it; when each may
is said in `interop.dlpack`.

Legend: L layers, N slots, P pages, S slots in a page, K KV heads, D head dim, V value head dim, B requests, B1 = B + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from fa_research.errors import InteropError
from fa_research.interop.dlpack import HandleCache, to_jax, to_torch
from fa_research.kv_cache import TokenToKVPool
from fa_research.metadata import FlashAttentionMetadata

if TYPE_CHECKING:
    import jax

_pools = HandleCache()


class SharedPool(NamedTuple):
    """A torch pool as JAX arrays [L, P, S, K, D] and [L, P, S, K, V]; pass it to jitted functions as an argument (it is
    a pytree). It keeps the memory alive."""

    k_LPSKD: jax.Array
    v_LPSKV: jax.Array


class SharedMetadata(NamedTuple):
    """The int32 tensors of a `FlashAttentionMetadata` as JAX arrays."""

    cache_seqlens_int32_B: jax.Array
    cu_seqlens_q_B1: jax.Array
    page_table_BP: jax.Array


def share_pool(pool: TokenToKVPool) -> SharedPool:
    """The pool for JAX. Handles are made once a pool and forgotten when it is freed. Raises InteropError."""
    pages = (-1, pool.page_size)
    k, v = (_pools.get(buffer.unflatten(1, pages)) for buffer in (pool.k_LNKD, pool.v_LNKV))
    return SharedPool(k, v)


def share_metadata(metadata: FlashAttentionMetadata) -> SharedMetadata:
    """The metadata of one pass for JAX. Static metadata is overwritten by the next step. Raises InteropError."""
    return SharedMetadata(
        to_jax(metadata.cache_seqlens_int32_B),
        to_jax(metadata.cu_seqlens_q_B1),
        to_jax(metadata.page_table_BP),
    )


def share_weights(module: nn.Module) -> dict[str, jax.Array]:
    """Every parameter and buffer of a torch module as a JAX array, by its name in `state_dict`. Raises InteropError
    with all that cannot be shared."""
    shared, reasons = {}, []
    for name, tensor in module.state_dict().items():
        try:
            shared[name] = to_jax(tensor)
        except InteropError as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        raise InteropError("weights cannot be shared: " + "; ".join(reasons))
    return shared


def adopt_weights(module: nn.Module, arrays: Mapping[str, jax.Array]) -> None:
    """The other way: the module's parameters and buffers become the memory of these JAX arrays, by name. For inference:
    JAX takes its arrays to be immutable. Raises InteropError with all that does not fit, and changes nothing then."""
    targets = module.state_dict(keep_vars=True)
    reasons = [f"{name}: not in the module" for name in arrays.keys() - targets.keys()]
    reasons += [f"{name}: missing" for name in targets.keys() - arrays.keys()]
    tensors = {}
    for name in targets.keys() & arrays.keys():
        tensor, target = to_torch(arrays[name]), targets[name]
        if (tensor.shape, tensor.dtype, tensor.device) != (target.shape, target.dtype, target.device):
            reasons.append(f"{name}: {_describe(tensor)} where the module has {_describe(target)}")
        tensors[name] = tensor
    if reasons:
        raise InteropError("weights cannot be adopted: " + "; ".join(sorted(reasons)))
    for name, tensor in tensors.items():
        targets[name].data = tensor


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
