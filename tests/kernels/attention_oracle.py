"""Paged cases and the dense float64 answer to them, written from the definition of the masks alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Padded to 16, 32, 64, 128 and 256; those that 16 does not divide are not aligned to 16 bytes in every dtype.
ODD_HEAD_DIMS = [8, 24, 40, 80, 96, 112, 192]
# bfloat16 is silently wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """A ragged batch over a shuffled pool in which every slot that is not in use holds NaN."""

    q: torch.Tensor  # [T, H, D]
    k: torch.Tensor  # [N, K, D]
    v: torch.Tensor  # [N, K, D]
    page_table: torch.Tensor  # [B, P]
    cache_seqlens: torch.Tensor  # [B]
    cu_seqlens_q: torch.Tensor  # [B + 1]
    page_size: int


def make_case(
    seqlens: list[int],
    q_lens: list[int] | None = None,
    *,
    page_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random q, k, v; pages in random order, page 0 unused; rubbish page ids past each request's last page."""
    random = torch.Generator().manual_seed(seed)
    q_lens = [1] * len(seqlens) if q_lens is None else q_lens
    counts = [-(-n // page_size) for n in seqlens]
    num_pages = sum(counts) + 4
    order = (torch.randperm(num_pages - 1, generator=random) + 1).to(torch.int32)
    width = max([*counts, 1]) + 2
    table = torch.full((len(seqlens), width), 2**30, dtype=torch.int32)
    k = torch.full((num_pages * page_size, kv_heads, head_dim), float("nan"))
    v = k.clone()
    for row, (length, count) in enumerate(zip(seqlens, counts, strict=True)):
        table[row, :count], order = order[:count], order[count:]
        slots = slots_of(table[row], length, page_size)
        k[slots] = torch.randn(length, kv_heads, head_dim, generator=random)
        v[slots] = torch.randn(length, kv_heads, head_dim, generator=random)
    q = torch.randn(sum(q_lens), heads, head_dim, generator=random) * 2
    cu = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seqlens, dtype=torch.int32)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    return Case(q, k, v, table.to(DEVICE), lens.to(DEVICE), cu.to(DEVICE), page_size)


def crowded(case: Case) -> tuple[Case, torch.Tensor]:
    """The case with 8 elements of NaN behind every head of q, K and V; and an output [T, H, D + 8], all of it 7."""

    def apart(x: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.full((*x.shape[:2], x.shape[2] + 8), filler, dtype=x.dtype, device=x.device)

    wide = [apart(x, float("nan")) for x in (case.q, case.k, case.v)]
    q, k, v = (new[..., :-8].copy_(x) for new, x in zip(wide, (case.q, case.k, case.v), strict=True))
    return replace(case, q=q, k=k, v=v), apart(q, 7.0)


def slots_of(table_P: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """Slots of a request's tokens 0 .. length - 1."""
    keys = torch.arange(length, device=table_P.device)
    return table_P[keys // page_size].long() * page_size + keys % page_size


def oracle(
    case: Case,
    *,
    scale: float,
    causal: bool = True,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, D] and natural LSE [T, H] (without the sink) in float64, one request at a time."""
    out = torch.zeros_like(case.q, dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], float("-inf"), dtype=torch.float64, device=case.q.device)
    group = case.q.shape[1] // case.k.shape[1]
    for row, length in enumerate(case.cache_seqlens.tolist()):
        begin, end = case.cu_seqlens_q[row : row + 2].tolist()
        slots = slots_of(case.page_table[row], length, case.page_size)
        k, v = (x[slots].double().repeat_interleave(group, 1) for x in (case.k, case.v))
        scores = torch.einsum("qhd,khd->hqk", case.q[begin:end].double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        p = (length - (end - begin) + torch.arange(end - begin, device=k.device))[:, None]
        j = torch.arange(length, device=k.device)[None, :]
        allowed = (j <= p) if causal else (j >= 0).expand(len(p), -1)
        if window:
            allowed = allowed & (j > p - window)
        if chunk:
            allowed = allowed & (j >= p.div(chunk, rounding_mode="floor") * chunk)
        scores = scores.masked_fill(~allowed, float("-inf"))
        norm = torch.logsumexp(scores, -1)
        lse[begin:end] = norm.T
        if sinks is not None:
            norm = torch.logaddexp(norm, sinks.double()[:, None])
        weights = torch.exp(scores - norm.masked_fill(norm == float("-inf"), 0.0)[..., None])
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out, lse


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Same infinities, no NaN, and elsewhere within `tolerance`, absolute and relative."""
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
