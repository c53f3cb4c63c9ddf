"""RoPE + KV write: against float64, over views of a fused projection and pools whose other slots must not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.kernels import ops, rope_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [(rope_kv, DEVICE, dtype) for dtype in KERNEL_DTYPES]
CASES += [(ops, "cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
IDS = [f"{module.__name__.split('.')[-1]}-{str(dtype)[6:]}" for module, _, dtype in CASES]
both = pytest.mark.parametrize(("module", "device", "dtype"), CASES, ids=IDS)


def rotated(x_THD: Tensor, cos_sin_XD: Tensor, positions_T: Tensor) -> Tensor:
    """By complex numbers, in float64: nothing in common with the code under test."""
    low, high = x_THD.double().chunk(2, dim=-1)
    cos, sin = cos_sin_XD.double()[positions_T][:, None].chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), dim=-1)


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    rtol = max(0.55 * torch.finfo(actual.dtype).eps, 2e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=2e-6)


def nan_pool(slots: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """A pool of NaN as a strided view, slots and heads both wider than they need be."""
    return torch.full((slots, heads + 1, dim + 16), float("nan"), dtype=dtype, device=device)[:, :heads, :dim]


def assert_only_slots_written(pool_NKD: Tensor, loc_T: Tensor) -> None:
    written = torch.zeros(pool_NKD.shape[0], dtype=torch.bool, device=pool_NKD.device)
    written[loc_T] = True
    assert bool(pool_NKD[~written].isnan().all()), "a slot that no token owns was written"
    _, heads, dim = pool_NKD.shape
    around = pool_NKD._base
    assert around is not None
    assert bool(around[:, heads:].isnan().all())
    assert bool(around[..., dim:].isnan().all()), "written past the end of a head"
    assert not bool(pool_NKD[written].isnan().any())


@both
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "v_dim"),
    [(5, 4, 2, 64, 64), (3, 32, 8, 128, 128), (2, 20, 5, 256, 256), (4, 6, 3, 48, 80), (1, 1, 1, 16, 16)],
)
def test_rope_write_kv(
    module, device: str, dtype: torch.dtype, tokens: int, q_heads: int, kv_heads: int, dim: int, v_dim: int
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(tokens, q_heads * dim + kv_heads * (dim + v_dim), device=device).to(dtype)
    q, k, v = qkv.split([q_heads * dim, kv_heads * dim, kv_heads * v_dim], dim=1)
    q, k, v = (
        q.unflatten(1, (q_heads, dim)),
        k.unflatten(1, (kv_heads, dim)),
        v.unflatten(1, (kv_heads, v_dim)),
    )
    q_before, k_before, v_before = q.clone(), k.clone(), v.clone()
    cos_sin = torch.randn(11, dim, device=device)
    positions = torch.randint(0, 11, (tokens,), device=device)
    loc = torch.randperm(12, device=device)[:tokens] + 1
    k_cache, v_cache = (
        nan_pool(16, kv_heads, dim, dtype, device),
        nan_pool(16, kv_heads, v_dim, dtype, device),
    )
    module.rope_write_kv(q, k, v, cos_sin, positions, k_cache, v_cache, loc)
    assert_rounded_once(q, rotated(q_before, cos_sin, positions))
    assert_rounded_once(k_cache[loc], rotated(k_before, cos_sin, positions))
    assert torch.equal(v_cache[loc], v_before)
    assert torch.equal(k, k_before)
    assert torch.equal(v, v_before)
    assert_only_slots_written(k_cache, loc)
    assert_only_slots_written(v_cache, loc)


@both
@pytest.mark.parametrize(("kv_heads", "dim", "v_dim"), [(8, 128, 128), (3, 48, 80), (40, 64, 64)])
def test_write_kv(module, device: str, dtype: torch.dtype, kv_heads: int, dim: int, v_dim: int) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(4, kv_heads, d + 8, device=device).to(dtype)[..., :d] for d in (dim, v_dim))
    k_cache, v_cache = nan_pool(9, kv_heads, dim, dtype, device), nan_pool(9, kv_heads, v_dim, dtype, device)
    loc = torch.tensor([3, 8, 1, 2], device=device)
    module.write_kv(k, v, k_cache, v_cache, loc)
    assert torch.equal(k_cache[loc], k)
    assert torch.equal(v_cache[loc], v)
    assert_only_slots_written(k_cache, loc)
    assert_only_slots_written(v_cache, loc)


@both
def test_padded_tokens_share_slot_zero(module, device: str, dtype: torch.dtype) -> None:
    """Padding writes to the sink any number of times; the other tokens arrive whole."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, heads, 32, device=device).to(dtype) for heads in (2, 1, 1))
    k_before, cos_sin = k.clone(), torch.randn(6, 32, device=device)
    k_cache, v_cache = nan_pool(4, 1, 32, dtype, device), nan_pool(4, 1, 32, dtype, device)
    loc, positions = torch.tensor([0, 2, 0, 0], device=device), torch.tensor([0, 5, 0, 0], device=device)
    module.rope_write_kv(q, k, v, cos_sin, positions, k_cache, v_cache, loc)
    assert_rounded_once(k_cache[loc[1:2]], rotated(k_before, cos_sin, positions)[1:2])
    assert_only_slots_written(k_cache, loc)
    assert_only_slots_written(v_cache, loc)


@pytest.mark.parametrize("module", [rope_kv, ops], ids=["rope_kv", "ops"])
def test_slots_past_two_to_the_31_elements(module) -> None:
    """int32 offsets overflow here (vLLM #50427, SGLang #34025): only a large pool's top slots are used."""
    device = DEVICE if module is rope_kv else "cpu"
    slots, kv_heads, dim = 2**24 + 8, 1, 128
    pool = torch.empty(
        slots, kv_heads, dim, dtype=torch.float16, device=device
    )  # 4.3 GB, but only touched pages exist
    assert pool.numel() > 2**31
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, kv_heads, dim, device=device).half() for _ in range(3))
    loc = torch.tensor([slots - 1, slots - 8, slots - 5], device=device)
    positions, cos_sin = torch.arange(3, device=device), torch.randn(3, dim, device=device)
    module.rope_write_kv(q, k, v, cos_sin, positions, pool, torch.empty_like(pool), loc)
    assert_rounded_once(pool[loc], rotated(k, cos_sin, positions))
    module.write_kv(k, v, torch.empty_like(pool), pool, loc)
    assert torch.equal(pool[loc], v)
