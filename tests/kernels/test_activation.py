"""The gated activations, the softcap and their torch twins against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.config import Activation
from fa_research.kernels import activation, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
ACTIVATIONS = [str(member) for member in Activation]


def reference(gate_up: Tensor, name: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return gate * torch.sigmoid(1.702 * gate) * up
    return gate * torch.sigmoid(gate) * up


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    rtol = max(0.55 * torch.finfo(actual.dtype).eps, 4e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 14336), (5, 40), (3, 1536), (70, 3000)])
def test_glu(tokens: int, width: int, dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    padded = torch.full((tokens, 2 * width + 16), float("nan"), dtype=dtype, device=DEVICE)
    gate_up = padded[:, 16:]
    gate_up.copy_(4 * torch.randn(tokens, 2 * width))
    out = activation.glu(gate_up, name)
    assert out.shape == (tokens, width)
    assert out.dtype == dtype
    assert_rounded_once(out, reference(gate_up, name))
    given = torch.full((tokens, width + 7), -7.0, dtype=dtype, device=DEVICE)
    activation.glu(gate_up, name, out=given[:, :width])
    assert torch.equal(given[:, :width], out)
    assert bool((given[:, width:] == -7).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_torch_twin_agrees(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(5, 80)).to(dtype)
    assert_rounded_once(ops.glu(gate_up, name), reference(gate_up, name))
    out = torch.empty(5, 40, dtype=dtype)
    assert ops.glu(gate_up, name, out=out) is out
    assert_rounded_once(out, reference(gate_up, name))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("function", [activation.glu, ops.glu], ids=["kernel", "torch"])
def test_far_ends_and_nan(function: object, name: str) -> None:
    assert callable(function)
    gate = torch.tensor([[-1e4, -300.0, -8.0, 8.0, 300.0, 1e4, float("nan"), 1.0]], device=DEVICE)
    up = torch.tensor([[1.0, -9.0, 9.0, -9.0, 9.0, 1.0, 1.0, float("nan")]], device=DEVICE)
    gate_up = torch.cat([gate, up], dim=-1)
    result = function(gate_up, name).double()
    torch.testing.assert_close(result, reference(gate_up, name), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_unknown_activation_is_refused() -> None:
    for function in (activation.glu, ops.glu):
        with pytest.raises(AssertionError, match="relu"):
            function(torch.zeros(1, 4, device=DEVICE), "relu")


@pytest.mark.parametrize("cap", [30.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [activation.softcap, ops.softcap], ids=["kernel", "torch"])
def test_softcap(function: object, dtype: torch.dtype, cap: float) -> None:
    assert callable(function)
    torch.manual_seed(0)
    x = (cap * 2 * torch.randn(3, 5000, device=DEVICE)).to(dtype)
    x[0, :2] = torch.tensor([3e4, -3e4])
    expected = cap * torch.tanh(x.double() / cap)
    assert function(x, cap) is x
    rtol = max(0.55 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(x.double(), expected, rtol=rtol, atol=1e-6 * cap)


def test_softcap_in_float64() -> None:
    x = torch.randn(7, dtype=torch.float64)
    expected = 2 * torch.tanh(x / 2)
    torch.testing.assert_close(ops.softcap(x, 2.0), expected, rtol=1e-14, atol=0)
