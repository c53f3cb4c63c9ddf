"""SiLU-mul kernel and its torch twin against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.kernels import activation, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    rtol = max(0.55 * torch.finfo(actual.dtype).eps, 2e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 14336), (5, 40), (3, 1536), (70, 3000)])
def test_silu_mul(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    padded = torch.full((tokens, 2 * width + 16), float("nan"), dtype=dtype, device=DEVICE)
    gate_up = padded[:, 16:]
    gate_up.copy_(4 * torch.randn(tokens, 2 * width))
    out = activation.silu_mul(gate_up)
    assert out.shape == (tokens, width)
    assert out.dtype == dtype
    assert_rounded_once(out, reference(gate_up))
    given = torch.full((tokens, width + 7), -7.0, dtype=dtype, device=DEVICE)
    activation.silu_mul(gate_up, out=given[:, :width])
    assert torch.equal(given[:, :width], out)
    assert bool((given[:, width:] == -7).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_torch_twin_agrees(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 80).to(dtype)
    assert_rounded_once(ops.silu_mul(gate_up), reference(gate_up))
    out = torch.empty(5, 40, dtype=dtype)
    assert ops.silu_mul(gate_up, out=out) is out
    assert_rounded_once(out, reference(gate_up))
