"""RMSNorm kernels and their torch twins against float64: rounded once, nothing outside the rows touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.kernels import norm, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPS = 1e-5


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """At most the rounding of the dtype, and what float32 arithmetic adds."""
    rtol = max(0.55 * torch.finfo(actual.dtype).eps, 2e-6)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=1e-6)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def strided_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A random [rows, width] view whose neighbours in memory are NaN."""
    padded = torch.full((rows + 2, width + 32), float("nan"), dtype=dtype, device=DEVICE)
    view = padded[1 : rows + 1, 16 : width + 16]
    view.copy_(torch.randn(rows, width))
    return view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (5, 48), (33, 64), (3, 2048), (2, 5120), (1, 16384)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = strided_rows(rows, width, dtype), torch.randn(width, device=DEVICE).to(dtype)
    expected = reference(x, weight)
    out = norm.rms_norm(x, weight, EPS)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert_rounded_once(out, expected)
    assert norm.rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_heads_in_place_leaves_the_rest_of_the_projection(dtype: torch.dtype) -> None:
    """QK norm: a [T, heads, D] view of the fused projection, more heads than one program takes."""
    torch.manual_seed(0)
    qkv, weight = torch.randn(3, 40, 128, device=DEVICE).to(dtype), torch.randn(128, device=DEVICE).to(dtype)
    before, q_THD = qkv.clone(), qkv[:, 3:28]
    norm.rms_norm(q_THD, weight, EPS, out=q_THD)
    assert_rounded_once(q_THD, reference(before[:, 3:28], weight))
    assert torch.equal(qkv[:, :3], before[:, :3])
    assert torch.equal(qkv[:, 28:], before[:, 28:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (5, 48), (33, 64), (2, 5120), (1, 16384)])
def test_add_rms_norm_normalises_the_rounded_residual(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = strided_rows(rows, width, dtype), strided_rows(rows, width, dtype)
    weight = torch.randn(width, device=DEVICE).to(dtype)
    x_before, total = x.clone(), (x.float() + residual.float()).to(dtype)
    out = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    assert out.data_ptr() not in (x.data_ptr(), residual.data_ptr())
    assert_rounded_once(out, reference(total, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_torch_twins_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = (
        torch.randn(5, 96).to(dtype),
        torch.randn(5, 96).to(dtype),
        torch.randn(96).to(dtype),
    )
    expected = reference(x, weight)
    assert_rounded_once(ops.rms_norm(x, weight, EPS), expected)
    total = residual + x
    assert_rounded_once(ops.add_rms_norm(x, residual, weight, EPS), reference(total, weight))
    assert torch.equal(residual, total)
    heads = x.view(5, 3, 32)
    expected = reference(heads, weight[:32])
    assert ops.rms_norm(heads, weight[:32], EPS, out=heads) is heads
    assert_rounded_once(heads, expected)
    if dtype == torch.float64:  # no float32 step on the way: the oracle's model runs through here
        torch.testing.assert_close(heads, expected, rtol=1e-13, atol=1e-13)
