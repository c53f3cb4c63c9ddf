"""The oracle itself, against loops over numbers that share nothing with it but the question."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fa_research.attention import reference
from fa_research.attention.reference import attention
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec


def visible(name: str, size: int, q_pos: int, num_keys: int) -> list[int]:
    """The keys that a query sees, as a list of positions and in other words than the masks use."""
    if name == "full":
        return list(range(num_keys))
    if name == "sliding_window":
        return [j for j in range(num_keys) if 0 <= q_pos - j < size]
    if name == "chunked":
        return [j for j in range(q_pos + 1) if j // size == q_pos // size]
    return list(range(q_pos + 1))


def brute_force(
    q: list[list[list[float]]],
    k: list[list[list[float]]],
    v: list[list[list[float]]],
    keys_of: list[list[int]],
    spec: AttentionSpec,
    sinks: list[float] | None,
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Output and LSE of each query and head, by the textbook: no maximum is subtracted, nothing is batched."""
    outs, lses = [], []
    for i, query in enumerate(q):
        out_H, lse_H = [], []
        for head, q_D in enumerate(query):
            kv_head = head * spec.num_kv_heads // spec.num_heads
            weights = []
            for j in keys_of[i]:
                score = spec.scale * sum(a * b for a, b in zip(q_D, k[j][kv_head], strict=True))
                if spec.softcap:
                    score = spec.softcap * math.tanh(score / spec.softcap)
                weights.append(math.exp(score))
            total = sum(weights)
            denominator = total + (math.exp(sinks[head]) if sinks else 0.0)
            rows = [v[j][kv_head] for j in keys_of[i]]
            width = range(spec.v_head_dim)
            out_H.append(
                [sum(w * row[d] for w, row in zip(weights, rows, strict=True)) / denominator for d in width]
            )
            lse_H.append(math.log(total))
        outs.append(out_H)
        lses.append(lse_H)
    return outs, lses


VARIANTS = [
    (Causal(), 0),
    (SlidingWindow(3), 3),
    (SlidingWindow(1), 1),
    (Chunked(4), 4),
    (Chunked(100), 100),
    (Full(), 0),
]


@pytest.mark.parametrize(("mask", "size"), VARIANTS, ids=lambda x: str(x))
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("has_sink", [False, True])
def test_against_a_loop(mask: Mask, size: int, softcap: float, has_sink: bool) -> None:
    spec = AttentionSpec(4, 2, 5, 3, 0.7, softcap, mask, has_sink=has_sink)
    generator = torch.Generator().manual_seed(1)

    def data(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = data(6, 4, 5), data(11, 2, 5), data(11, 2, 3)
    sinks = data(4) if has_sink else None
    q_pos = list(range(5, 11))
    keys_of = [visible(mask.name, size, p, 11) for p in q_pos]
    expected = brute_force(
        q.tolist(), k.tolist(), v.tolist(), keys_of, spec, sinks.tolist() if sinks is not None else None
    )
    out, lse = attention(q, k, v, torch.tensor(q_pos), spec, sinks_H=sinks, compute_dtype=torch.float64)
    torch.testing.assert_close(out, torch.tensor(expected[0], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.tensor(expected[1], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    """exp(1000) is inf in float64: the softmax must be shifted by its maximum."""
    spec = AttentionSpec(1, 1, 1, 1, 1.0)
    q, k = torch.full((1, 1, 1), 1000.0), torch.tensor([1.0, 0.999]).view(2, 1, 1)
    out, lse = attention(q, k, k, torch.tensor([1]), spec, compute_dtype=torch.float64)
    weight = 1 / (1 + math.exp(-1))
    assert out.item() == pytest.approx(weight * 1.0 + (1 - weight) * 0.999, abs=1e-6)
    assert lse.item() == pytest.approx(1000 + math.log1p(math.exp(-1)), abs=1e-3)


@pytest.mark.parametrize("has_sink", [False, True])
def test_a_query_without_keys_yields_zero(has_sink: bool) -> None:
    """The mask of a request at positions before its only key; NaN must not appear."""
    spec = AttentionSpec(2, 1, 4, 4, 1.0, has_sink=has_sink)
    k = torch.randn(3, 1, 4)
    sinks = torch.zeros(2) if has_sink else None
    out, lse = attention(
        k.expand(3, 2, 4), k, k, torch.tensor([-1, 0, -5]), spec, sinks_H=sinks, compute_dtype=torch.float64
    )
    assert out[[0, 2]].eq(0).all() and lse[[0, 2]].eq(-math.inf).all()
    assert out[1].ne(0).all() and lse[1].isfinite().all()


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long requests are evaluated in blocks of queries; here a block holds two."""
    spec = AttentionSpec(2, 1, 4, 4, 0.5, mask=SlidingWindow(3))
    q, k, v = torch.randn(7, 2, 4), torch.randn(9, 1, 4), torch.randn(9, 1, 4)
    whole = attention(q, k, v, torch.arange(2, 9), spec, compute_dtype=torch.float64)
    monkeypatch.setattr(reference, "_SCORE_BYTES", 2 * 9 * 2 * 8)
    blocks = attention(q, k, v, torch.arange(2, 9), spec, compute_dtype=torch.float64)
    for a, b in zip(whole, blocks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_paged_reads_the_slots_of_the_request_and_no_others() -> None:
    """Lengths around the page size, pages in no order, NaN in every slot that no request owns."""
    page_size, rng = 3, random.Random(0)
    seq_lens, extend_lens = [1, 3, 4, 8], [1, 2, 4, 3]
    pages = [[5], [2], [9, 1], [7, 3, 8]]
    spec = AttentionSpec(2, 2, 4, 4, 1.0)
    k_cache, v_cache = (torch.full((10 * page_size, 2, 4), math.nan, dtype=torch.float64) for _ in range(2))
    table = torch.full((4, 4), 6, dtype=torch.int32)  # page 6 is nobody's
    dense = []
    for b, (own, length) in enumerate(zip(pages, seq_lens, strict=True)):
        table[b, : len(own)] = torch.tensor(own)
        dense.append(torch.randn(2, length, 2, 4, dtype=torch.float64))
        for j in range(length):
            slot = own[j // page_size] * page_size + j % page_size
            k_cache[slot], v_cache[slot] = dense[b][0, j], dense[b][1, j]
    q = torch.randn(sum(extend_lens), 2, 4, dtype=torch.float64)
    args = (table, seq_lens, extend_lens, page_size, spec)
    out, lse = reference.paged_attention(q, k_cache, v_cache, *args, compute_dtype=torch.float64)
    start = 0
    for b in rng.sample(range(4), 4):
        start = sum(extend_lens[:b])
        end = start + extend_lens[b]
        q_pos = torch.arange(seq_lens[b] - extend_lens[b], seq_lens[b])
        alone = attention(q[start:end], *dense[b], q_pos, spec, compute_dtype=torch.float64)
        torch.testing.assert_close(out[start:end], alone[0])
        torch.testing.assert_close(lse[start:end], alone[1])
