"""Attention as its definition says: the mask's own predicate, a softmax, a sum. The oracle, and the `torch`
backend.

Legend: Q queries of one request, T keys of one request, H query heads, K KV heads, G = H / K, D head dim, V
value dim."""

from __future__ import annotations

import torch
from torch import Tensor

from fa_research.spec import AttentionSpec

_SCORE_BYTES = 1 << 30  # scores are evaluated in blocks of queries of about this size


def attention(
    q_QHD: Tensor,
    k_TKD: Tensor,
    v_TKV: Tensor,
    q_pos_Q: Tensor,
    spec: AttentionSpec,
    *,
    sinks_H: Tensor | None = None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [Q, H, V] and LSE [Q, H] (natural, without the sink), both in `compute_dtype`, of one request
    whose keys are at positions 0..T-1. A query that sees no key yields 0 and -inf."""
    rows = max(1, _SCORE_BYTES // max(1, k_TKD.shape[0] * spec.num_heads * compute_dtype.itemsize))
    k_KTD = k_TKD.to(compute_dtype).transpose(0, 1)
    v_KTV = v_TKV.to(compute_dtype).transpose(0, 1)
    blocks = [
        _block(q.to(compute_dtype), k_KTD, v_KTV, positions, spec, sinks_H)
        for q, positions in zip(q_QHD.split(rows), q_pos_Q.split(rows), strict=True)
    ]
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _block(
    q_QHD: Tensor, k_KTD: Tensor, v_KTV: Tensor, q_pos_Q: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_queries, group = q_QHD.shape[0], spec.num_heads // spec.num_kv_heads
    q_KGQD = q_QHD.unflatten(1, (spec.num_kv_heads, group)).permute(1, 2, 0, 3)
    scores = q_KGQD @ k_KTD[:, None].transpose(-1, -2) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    k_pos_T = torch.arange(k_KTD.shape[1], device=q_QHD.device)
    allowed_QT = spec.mask.allows(q_pos_Q[:, None], k_pos_T[None, :])
    scores = scores.masked_fill(~allowed_QT, float("-inf"))
    lse_KGQ = torch.logsumexp(scores, dim=-1)
    denominator = lse_KGQ
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).view(spec.num_kv_heads, group, 1)
        denominator = torch.logaddexp(lse_KGQ, sinks)
    weights = torch.exp(scores - denominator[..., None]).masked_fill(~allowed_QT, 0.0)
    out_KGQV = weights @ v_KTV[:, None]
    out = out_KGQV.permute(2, 0, 1, 3).reshape(num_queries, spec.num_heads, -1)
    return out, lse_KGQ.permute(2, 0, 1).reshape(num_queries, spec.num_heads)


def paged_attention(
    q_THD: Tensor,
    k_cache_NKD: Tensor,
    v_cache_NKV: Tensor,
    page_table_BP: Tensor,
    seq_lens: list[int],
    extend_lens: list[int],
    page_size: int,
    spec: AttentionSpec,
    *,
    sinks_H: Tensor | None = None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same over a paged cache and a ragged batch: request b's queries are the last `extend_lens[b]` of
    its `seq_lens[b]` tokens. Only slots that the request owns are read."""
    offsets_S = torch.arange(page_size, device=q_THD.device)
    outs, lses, start = [], [], 0
    for pages_P, seq_len, extend_len in zip(page_table_BP, seq_lens, extend_lens, strict=True):
        if extend_len == 0:
            continue  # padding
        pages = pages_P[: -(-seq_len // page_size)].long()
        slots = (pages[:, None] * page_size + offsets_S).flatten()[:seq_len]
        q_pos = torch.arange(seq_len - extend_len, seq_len, device=q_THD.device)
        q = q_THD[start : start + extend_len]
        k, v = k_cache_NKD[slots], v_cache_NKV[slots]
        out, lse = attention(q, k, v, q_pos, spec, sinks_H=sinks_H, compute_dtype=compute_dtype)
        outs.append(out)
        lses.append(lse)
        start += extend_len
    return torch.cat(outs), torch.cat(lses)
