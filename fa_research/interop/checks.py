"""What `paged_attention` checks of its arguments before anything is compiled."""

from __future__ import annotations

from typing import Any

from fa_research.errors import InteropError


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
    check(
        q.shape[1] % k.shape[2] == 0,
        f"{q.shape[1]} query heads are no multiple of {k.shape[2]} KV heads",
    )


def check(ok: bool, otherwise: str) -> None:
    """Raises InteropError with the text `otherwise` unless `ok`."""
    if not ok:
        raise InteropError(f"paged_attention: {otherwise}")
