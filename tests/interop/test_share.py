"""Pools, metadata and weights on both sides."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef  # type: ignore[attr-defined]

jax = pytest.importorskip("jax")

from fa_research.errors import InteropError  # noqa: E402
from fa_research.interop import share  # noqa: E402
from fa_research.interop.dlpack import to_jax  # noqa: E402
from fa_research.kv_cache import TokenToKVPool  # noqa: E402
from tests.helpers import DEVICES, Scene, make_spec  # noqa: E402


def make_pool(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> TokenToKVPool:
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 32}
    return TokenToKVPool(5, 16, dtype=dtype, device=device, **shape)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pool_is_shared_in_place_and_once(device: str) -> None:
    pool = make_pool(device)
    shared = share.share_pool(pool)
    assert shared.k_LPSKD.unsafe_buffer_pointer() == pool.k_LNKD.data_ptr()
    assert shared.v_LPSKV.unsafe_buffer_pointer() == pool.v_LNKV.data_ptr()
    assert shared.k_LPSKD.shape == (3, 6, 16, 2, 64) and shared.v_LPSKV.shape == (3, 6, 16, 2, 32)
    again = share.share_pool(pool)
    assert again.k_LPSKD is shared.k_LPSKD and again.v_LPSKV is shared.v_LPSKV


def test_a_freed_pool_is_forgotten() -> None:
    pool = make_pool()
    storage, before = StorageWeakRef(pool.k_LNKD.untyped_storage()), len(share._pools)
    share.share_pool(pool)
    assert len(share._pools) == before + 2
    del pool
    gc.collect()
    assert len(share._pools) == before and storage.expired()


def test_a_pool_that_jax_cannot_hold() -> None:
    with pytest.raises(InteropError, match="float64: JAX makes it 32-bit"):
        share.share_pool(make_pool(dtype=torch.float64))


def test_metadata() -> None:
    scene = Scene(make_spec(), ((0, 5), (16, 1)), 16, torch.float32)
    metadata = scene.backend("torch").init_forward_metadata(scene.batch(), scene.table)
    shared = share.share_metadata(metadata)
    assert shared.page_table_BP.unsafe_buffer_pointer() == metadata.page_table_BP.data_ptr()
    assert shared.cache_seqlens_int32_B.tolist() == [5, 17] and shared.cu_seqlens_q_B1.tolist() == [0, 5, 6]


def test_weights_go_both_ways() -> None:
    ours, theirs = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)
    arrays = share.share_weights(ours)
    assert {name: a.unsafe_buffer_pointer() for name, a in arrays.items()} == {
        "weight": ours.weight.data_ptr(),
        "bias": ours.bias.data_ptr(),
    }
    share.adopt_weights(theirs, arrays)
    assert theirs.weight.data_ptr() == ours.weight.data_ptr() and isinstance(
        theirs.weight, torch.nn.Parameter
    )
    x = torch.randn(4, 16)
    assert torch.equal(theirs(x), ours(x))


def test_weights_that_do_not_fit_are_all_named_and_none_is_taken() -> None:
    module = torch.nn.Linear(16, 32)
    before = module.weight.data_ptr()
    wrong = {"weight": to_jax(torch.zeros(16, 16)), "scale": to_jax(torch.zeros(16))}
    says = r"bias: missing; scale: not in the module; weight: float32 \(16, 16\) on cpu where the module has float32"
    with pytest.raises(InteropError, match=says):
        share.adopt_weights(module, wrong)
    assert module.weight.data_ptr() == before


def test_weights_that_cannot_be_shared_are_all_named() -> None:
    module = torch.nn.Linear(16, 32, dtype=torch.float64)
    with pytest.raises(InteropError, match="weight: .*float64.*bias: .*float64"):
        share.share_weights(module)
