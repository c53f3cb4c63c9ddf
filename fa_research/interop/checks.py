"""What `paged_attention` checks of its arguments before anything is compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fa_research.errors import InteropError
from fa_research.interop.dlpack import import_jax


def check_arrays(arrays: Mapping[str, Any]) -> None:
    """Each a JAX array (or None), and those that are no tracers on one device."""
    jax = import_jax()
    for name, array in arrays.items():
        if array is None:
            continue
        kind = f"{type(array).__module__.split('.')[0]}.{type(array).__name__}"
        hint = (
            "share it with interop.dlpack.to_jax"
            if kind.startswith("torch.")
            else "pass jax.numpy.asarray of it"
        )
        check(isinstance(array, jax.Array), f"{name} is a {kind}, it has to be a jax.Array; {hint}")
        if not isinstance(array, jax.core.Tracer):
            count = len(array.devices())
            check(
                count == 1,
                f"{name} is on {count} devices, and is read where it lies; call it within jax.shard_map",
            )


def number(name: str, given: Any, read: Callable[[Any], Any]) -> Any:
    """A number that the compiled program is made for, by `read`: float or operator.index."""
    try:
        return read(given)
    except Exception:  # of JAX's several, for what is traced
        wanted = "a whole number" if read is operator.index else "a number"
        raise InteropError(
            f"paged_attention: {name}={given}: has to be {wanted} that is known when the call is traced, not an array "
            "that the program computes"
        ) from None


def bound(name: str, given: Any) -> int | None:
    """A bound of lengths, or None."""
    if given is None:
        return None
    value: int = number(name, given, operator.index)
    check(value >= 1, f"{name}={value}: a bound of lengths is at least 1")
    return value


def torch_dtype(name: str, array: Any) -> torch.dtype:
    """Torch's name of the array's type is JAX's, where it has the type."""
    found = getattr(torch, str(array.dtype), None)
    check(isinstance(found, torch.dtype), f"{name} is {array.dtype}, which torch has not by that name")
    assert isinstance(found, torch.dtype)
    return found


def check_arguments(q: Any, k: Any, v: Any, table: Any, seqlens: Any, cu_seqlens_q: Any, sinks: Any) -> None:
    """Shapes and dtypes of one layer's arrays, as far as they are known when a call is traced."""
    ranks = {"q_THD": (q, 3), "k_PSKD": (k, 4), "v_PSKV": (v, 4), "page_table_BP": (table, 2)}
    ranks |= {"cache_seqlens_B": (seqlens, 1), "cu_seqlens_q_B1": (cu_seqlens_q, 1)}
    for name, (array, rank) in ranks.items():
        check(array.ndim == rank, f"{name} has shape {array.shape}, it needs {rank} dimensions")
    for name, array in (
        ("page_table_BP", table),
        ("cache_seqlens_B", seqlens),
        ("cu_seqlens_q_B1", cu_seqlens_q),
    ):
        check(str(array.dtype) == "int32", f"{name} is {array.dtype}, it has to be int32")
    _check_heads(q, k, v)
    batch = seqlens.shape[0]
    check(table.shape[0] == batch, f"page_table_BP has {table.shape[0]} rows for {batch} requests")
    check(
        cu_seqlens_q.shape[0] == batch + 1,
        f"cu_seqlens_q_B1 has {cu_seqlens_q.shape[0]} entries for {batch} requests, it needs {batch + 1}",
    )
    if sinks is not None:
        check(sinks.shape == (q.shape[1],), f"sinks_H is {sinks.shape} for {q.shape[1]} query heads")


def _check_heads(q: Any, k: Any, v: Any) -> None:
    check(
        q.dtype == k.dtype == v.dtype, f"dtypes of q, k and v: {q.dtype}, {k.dtype}, {v.dtype}; make them one"
    )
    check(
        k.shape[:3] == v.shape[:3], f"k_PSKD is {k.shape}, v_PSKV is {v.shape}: pages, slots and heads differ"
    )
    check(q.shape[2] == k.shape[3], f"head dim of q is {q.shape[2]}, that of k is {k.shape[3]}")
    heads, kv_heads = q.shape[1], k.shape[2]
    check(
        kv_heads > 0 and heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} KV heads"
    )


def check(ok: bool, otherwise: str) -> None:
    """Raises InteropError with the text `otherwise` unless `ok`."""
    if not ok:
        raise InteropError(f"paged_attention: {otherwise}")
