"""Exact arithmetic on partial attention results (the split-KV combine of FlashDecoding, and sinks as an
epilogue).

Legend: T query tokens, H query heads, V value head dim. LSE is the natural logarithm, float32, [T, H].
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a_THV: Tensor, lse_a_TH: Tensor, out_b_THV: Tensor, lse_b_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys. A side that saw no key has LSE -inf and counts for
    nothing, whatever its kernel left in the output."""
    lse = torch.logaddexp(lse_a_TH, lse_b_TH)
    out = _weighted(out_a_THV, lse_a_TH, lse) + _weighted(out_b_THV, lse_b_TH, lse)
    return out.to(out_a_THV.dtype), lse


def _weighted(out_THV: Tensor, part_lse_TH: Tensor, lse_TH: Tensor) -> Tensor:
    weight_TH1 = torch.exp(part_lse_TH - lse_TH)[..., None]  # NaN where neither side saw a key
    return torch.where(weight_TH1 > 0, weight_TH1 * out_THV, 0.0)


def apply_sinks(out_THV: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> Tensor:
    """Add one more logit per head to the softmax's denominator after the fact: out * sigmoid(lse - sink).
    Apply it once, after all merging."""
    keep_TH = torch.sigmoid(lse_TH - sinks_H.to(lse_TH.dtype))
    return (out_THV * keep_TH[..., None]).to(out_THV.dtype)
