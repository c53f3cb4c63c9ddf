"""The attention path of a model alone: the same engine without matrix products, norms or a head.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, E = H * V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_research.attention.layer import Attend, PagedAttention
from fa_research.batch import ForwardMode
from fa_research.config.limits import require
from fa_research.spec import AttentionSpec


class AttentionStack:
    """Stands where a model stands (`workload.level=attention`). Queries, keys and values are standard-normal,
    drawn once from `seed`; `outputs[mode, num_tokens][layer_id]` keeps the last output [T, H, V] of that size for
    the check (a graph of one batch size writes to its own)."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        *,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        require({"number of attention layers": len(specs), "max_tokens": max_tokens})
        self.attention_specs = tuple(specs)
        self.notes: list[str] = []
        first = specs[0]
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(heads: int, dim: int) -> Tensor:
            return torch.randn(max_tokens, heads, dim, dtype=dtype, device=device, generator=generator)

        self.q_THD = normal(first.num_heads, first.head_dim)
        self.k_TKD = normal(first.num_kv_heads, first.head_dim)
        self.v_TKV = normal(first.num_kv_heads, first.v_head_dim)
        sinks = torch.randn(first.num_heads, dtype=dtype, device=device, generator=generator)
        self.sinks_H = sinks if first.has_sink else None
        self.outputs: dict[tuple[ForwardMode, int], list[Tensor]] = {}

    def __call__(self, input_ids_T: Tensor, attend: Attend, rows_M: Tensor | None = None) -> Tensor:
        """The last layer's output [T, E], whatever rows are wanted. The ids say how many tokens there are, no more."""
        assert isinstance(attend, PagedAttention)
        num_tokens = input_ids_T.shape[0]
        q, k, v = (tensor[:num_tokens] for tensor in (self.q_THD, self.k_TKD, self.v_TKV))
        layers = range(len(self.attention_specs))
        outputs = [attend(layer_id, q, k, v, rope=None, sinks_H=self.sinks_H) for layer_id in layers]
        self.outputs[attend.mode, num_tokens] = outputs
        return outputs[-1].flatten(1)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """There is no head."""
        return None
