"""One layer's attention in one pass, as a value: what the engine hands to a backend.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, N slots, P pages, S slots in a page.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec

# Output [T, H, V] in the query's dtype, and, where it is asked for, LSE [T, H] in float32 (natural, without the sink).
AttentionOutput = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class AttentionCall:
    """Queries are ragged: a request's queries are the last of its `cache_seqlens` tokens, and the cache holds the keys
    and values of all of them. `metadata.q_len` says whether each request has the same number of queries.

    sinks_H: a logit for each query head that joins the softmax's denominator, or None. return_lse: whether the LSE is
    wanted. out_THV: where the output goes, for a kernel that can write there; others return a tensor of their own."""

    q_THD: Tensor
    k_cache_NKD: Tensor
    v_cache_NKV: Tensor
    metadata: FlashAttentionMetadata
    spec: AttentionSpec
    sinks_H: Tensor | None = None
    return_lse: bool = False
    out_THV: Tensor | None = None

    def pages(self) -> tuple[Tensor, Tensor]:
        """Keys [P, S, K, D] and values [P, S, K, V]: views of the cache."""
        size = self.metadata.page_size
        return self.k_cache_NKD.unflatten(0, (-1, size)), self.v_cache_NKV.unflatten(0, (-1, size))
