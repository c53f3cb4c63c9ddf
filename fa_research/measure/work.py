"""Bytes and operations that a pass cannot avoid, counted from its lengths and its layers' masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fa_research.spec import AttentionSpec
from fa_research.workloads.base import Pass


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Of one pass over all layers. bytes: keys and values that some query sees, queries and outputs, each once (pages
    that requests share: once for each of them, though an L2 may spare some). flops: two per multiply-add of the allowed
    scores and of their weighted sum."""

    bytes: int
    flops: int


def attention_work(done: Pass, specs: Sequence[AttentionSpec], itemsize: int) -> AttentionWork:
    """The work of attention for this pass, `itemsize` bytes an element."""
    num_bytes = flops = 0
    for spec in specs:
        dims = spec.head_dim + spec.v_head_dim
        for seq_len, extend_len in zip(done.seq_lens, done.extend_lens, strict=True):
            keys, scores = _keys_and_scores(spec, seq_len, extend_len)
            num_bytes += (keys * spec.num_kv_heads + extend_len * spec.num_heads) * dims * itemsize
            flops += 2 * scores * spec.num_heads * dims
    return AttentionWork(num_bytes, flops)


def _keys_and_scores(spec: AttentionSpec, seq_len: int, extend_len: int) -> tuple[int, int]:
    """Keys that any query of the request sees, and (query, key) pairs that the mask allows."""
    band = spec.mask.band()
    first = seq_len - extend_len
    if band is None:
        allowed = spec.mask.allows(np.arange(first, seq_len)[:, None], np.arange(seq_len)[None, :])
        return int(np.any(allowed, axis=0).sum()), int(np.sum(allowed))
    if not band.causal:
        return seq_len, seq_len * extend_len
    if not band.window and not band.chunk:
        return seq_len, (first + 1 + seq_len) * extend_len // 2
    begins = [
        max(p - band.window + 1 if band.window else 0, p // band.chunk * band.chunk if band.chunk else 0, 0)
        for p in range(first, seq_len)
    ]
    return seq_len - begins[0], sum(
        p + 1 - begin for p, begin in zip(range(first, seq_len), begins, strict=True)
    )
