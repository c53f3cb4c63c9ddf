"""Partial results join exactly, and a sink after the fact is a sink in the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fa_research.attention.merge import apply_sinks, merge
from fa_research.attention.reference import attention
from fa_research.masks import Full
from fa_research.spec import AttentionSpec

SPEC = AttentionSpec(4, 2, 8, 8, 0.5, mask=Full())


def parts(
    cuts: list[int], keys: int = 20
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], Tensor]:
    """Attention over each piece of the keys, over all of them, and the same data's sinks."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(n, h, 8, generator=generator, dtype=torch.float64)
        for n, h in ((5, 4), (keys, 2), (keys, 2))
    )
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    q_pos = torch.full((5,), keys)

    def over(first: int, last: int) -> tuple[Tensor, Tensor]:
        return attention(q, k[first:last], v[first:last], q_pos, SPEC, compute_dtype=torch.float64)

    borders = [0, *cuts, keys]
    return [over(a, b) for a, b in zip(borders, borders[1:], strict=False)], over(0, keys), sinks


@pytest.mark.parametrize("cuts", [[1], [10], [19], [3, 4, 11]])
def test_merged_pieces_are_the_whole(cuts: list[int]) -> None:
    pieces, (out, lse), _ = parts(cuts)
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merge(*merged, *piece)
    torch.testing.assert_close(merged[0], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged[1], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
def test_a_side_without_keys_counts_for_nothing(garbage: float) -> None:
    """Whatever a kernel leaves in the output of a query that saw no key."""
    _, (out, lse), _ = parts([])
    empty = (torch.full_like(out, garbage), torch.full_like(lse, -math.inf))
    for merged in (merge(out, lse, *empty), merge(*empty, out, lse)):
        torch.testing.assert_close(merged[0], out)
        torch.testing.assert_close(merged[1], lse)


def test_two_sides_without_keys_are_zero() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), -math.inf)
    merged = merge(out, lse, out, lse)
    assert merged[0].eq(0).all() and merged[1].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_parts_are_kept(dtype: torch.dtype) -> None:
    pieces, (out, lse), _ = parts([7])
    low = [(o.to(dtype), s.float()) for o, s in pieces]
    merged = merge(*low[0], *low[1])
    assert merged[0].dtype == dtype and merged[1].dtype == torch.float32
    torch.testing.assert_close(merged[0].double(), out, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_sink_after_merging_is_a_sink_in_the_softmax() -> None:
    sinks = parts([])[2]
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((5, 4), (12, 2), (12, 2)))
    spec = AttentionSpec(4, 2, 8, 8, 0.5, mask=Full(), has_sink=True)
    inside, _ = attention(q, k, v, torch.arange(5), spec, sinks_H=sinks, compute_dtype=torch.float64)
    halves = [
        attention(q, k[a:b], v[a:b], torch.arange(5), SPEC, compute_dtype=torch.float64)
        for a, b in ((0, 5), (5, 12))
    ]
    out, lse = merge(*halves[0], *halves[1])
    torch.testing.assert_close(apply_sinks(out, lse, sinks), inside, rtol=1e-12, atol=1e-12)


def test_extreme_sinks() -> None:
    """A sink of -inf is no sink; one far above every score leaves nothing; a query without keys stays 0."""
    out, lse = torch.ones(2, 2, 3), torch.tensor([[0.0, -math.inf], [3.0, 1.0]])
    out[0, 1] = 0.0
    assert torch.equal(apply_sinks(out, lse, torch.full((2,), -1e30)), out)
    assert apply_sinks(out, lse, torch.full((2,), 1e4)).eq(0).all()
