"""Kept sets of the sampling kernels and their torch twin, against transformers and a float64 definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.kernels import sampling, sampling_torch
from tests.kernels.sampling_oracle import DEVICE, SAMPLED, Params, defined, logits_of, packed

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # of the interpreter, at -inf


def by_kernel(logits_BX: Tensor, params: list[Params], capacity: int) -> Tensor:
    _, threshold_B = sampling.thresholds(logits_BX, *packed(params), capacity)
    return logits_BX >= threshold_B[:, None]


def assert_kept(logits_BX: Tensor, params: list[Params], capacities: tuple[int, ...]) -> None:
    expected = torch.stack([defined(x, p) for x, p in zip(logits_BX, params, strict=True)])
    by_torch = sampling_torch.kept(logits_BX.float(), *packed(params)).cpu()
    for actual in (by_torch, *(by_kernel(logits_BX, params, capacity).cpu() for capacity in capacities)):
        assert actual.sum(-1).tolist() == expected.sum(-1).tolist()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "equal", "masked"])
def test_kept_sets_are_those_of_the_definition(kind: str) -> None:
    """Also with room for so few logits at a time that the kernel has to narrow its bounds pass by pass."""
    assert_kept(logits_of(kind, len(SAMPLED), 700), SAMPLED, (1024, 128, 16))


LEADING = [
    *[Params(0.8, k) for k in (1, 50, 64, 65, 100, 126)],
    *[Params(1.2, k, p) for k in (1, 60, 100, 2000) for p in (0.05, 0.9)],
    *[Params(0.6, top_p=p) for p in (0.01, 0.5, 0.99)],
    Params(0.6, 100, 0.8, 0.02),
]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("flat", torch.float32),
        ("ties", torch.float32),
        ("flat", torch.bfloat16),
        ("ties", torch.bfloat16),
        ("masked", torch.bfloat16),
        ("peaked", torch.float16),
    ],
    ids=str,
)
def test_kept_sets_are_the_same_in_leading_groups_and_in_the_row(kind: str, dtype: torch.dtype) -> None:
    """126 groups of ids. They lead in few registers (64 groups), in many, or are too many for the capacity."""
    assert_kept(logits_of(kind, len(LEADING), 4000, dtype), LEADING, (8192, 1024))


@pytest.mark.parametrize("capacity", [8192, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinity_is_above_the_largest_finite_logit(dtype: torch.dtype, capacity: int) -> None:
    """Though they share a key of bfloat16. (In float32 it counts as the largest finite number.)"""
    x_BX = torch.randn(3, 4200).to(dtype).to(DEVICE)
    largest = min(torch.finfo(dtype).max, 3.39e38)
    x_BX[:, [5, 9]] = torch.tensor([largest, float("inf")], dtype=dtype, device=DEVICE)
    kept_BX = by_kernel(x_BX, [Params(top_k=1), Params(top_p=0.5), Params(1.0, 3, 0.5)], capacity)
    assert kept_BX.nonzero().tolist() == [[0, 9], [1, 9], [2, 9]]


@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_kept_sets_are_those_of_transformers(kind: str) -> None:
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="the GPU suite runs without it"
    )
    logits_BX = logits_of(kind, len(SAMPLED), 997)
    rows = []
    for x, params in zip(logits_BX.double().cpu(), SAMPLED, strict=True):
        warpers = [process.TemperatureLogitsWarper(params.temperature)]
        warpers += [process.TopKLogitsWarper(params.top_k)] if params.top_k else []
        warpers += [process.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        warpers += [process.MinPLogitsWarper(params.min_p)] if params.min_p else []
        row = x[None]
        for warper in warpers:
            row = warper(None, row)
        rows.append(row[0] > float("-inf"))
    expected = torch.stack(rows)
    assert torch.equal(sampling_torch.kept(logits_BX, *packed(SAMPLED)).cpu(), expected)
    assert torch.equal(by_kernel(logits_BX, SAMPLED, 128).cpu(), expected)
