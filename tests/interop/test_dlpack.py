"""Tensors on both sides without a copy: pointers, errors, and handles that go with the memory."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef  # type: ignore[attr-defined]

jax = pytest.importorskip("jax")

from fa_research.errors import FaResearchError, InteropError  # noqa: E402
from fa_research.interop.dlpack import (  # noqa: E402
    MISSING,
    HandleCache,
    import_jax,
    jax_device,
    reasons_against_jax,
    to_jax,
    to_torch,
)
from tests.helpers import DEVICES  # noqa: E402

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int32, torch.int8, torch.uint8, torch.bool),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_is_the_same_memory(device: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(24, device=device).view(2, 3, 4).to(dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.shape == (2, 3, 4) and str(array.dtype) == str(dtype).removeprefix("torch.")
    assert array.devices() == {jax_device(tensor.device)}
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr() and back.dtype == dtype and back.device == tensor.device
    assert torch.equal(back.float(), tensor.float())


def test_a_permuted_view_is_shared() -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    assert (to_jax(tensor)[1, 1] == tensor[1, 1].numpy()).all()


def test_parameters_are_shared_without_their_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(16))
    assert to_jax(weight).unsafe_buffer_pointer() == weight.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(4, 2, 16)[:, 0], r"strides \(32, 1\).*share what it is a view of, or call .contiguous"),
        (torch.zeros(1).expand(64), r"strides \(0,\)"),
        (torch.zeros(65)[1:], "not a multiple of 64 bytes.*slice in JAX, or clone it"),
        (torch.zeros(4, dtype=torch.float64), "dtype float64: JAX makes it 32-bit; set JAX_ENABLE_X64=1"),
        (torch.zeros(4, dtype=torch.int64), "dtype int64: JAX makes it 32-bit"),
        (torch.zeros(4, dtype=torch.uint64), "dtype uint64: JAX makes it 32-bit"),
        (torch.zeros(4, 4).to_sparse(), "layout torch.sparse_coo: JAX shares dense tensors only"),
        (torch.zeros(4, device="meta"), "device meta: JAX shares memory with torch on cpu and cuda only"),
    ],
)
def test_what_cannot_be_shared_is_an_error_and_no_copy(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(InteropError, match=says) as error:
        to_jax(tensor)
    assert isinstance(error.value, FaResearchError), "the command line prints it as one line"


def test_every_reason_is_given() -> None:
    with pytest.raises(InteropError, match="float64.*strides.*address"):
        to_jax(torch.zeros(9, 2, dtype=torch.float64)[1:, 0])


def test_float64_with_x64(x64: None) -> None:
    tensor = torch.full((8,), 1 / 3, dtype=torch.float64)
    assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


def test_jax_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find_spec(name))
    assert reasons_against_jax(torch.device("cpu")) == (MISSING,) and ".[jax]" in MISSING
    with pytest.raises(InteropError, match=r"pip install -e '\.\[jax\]'"):
        import_jax()


def test_jax_without_a_gpu_beside_torch_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    (reason,) = reasons_against_jax(torch.device("cuda"))
    assert "JAX has no CUDA plugin, torch is on a GPU" in reason and "device=cpu" in reason
    assert reasons_against_jax(torch.device("cpu")) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_a_device_that_jax_has_not() -> None:
    with pytest.raises(InteropError, match="device=cuda: JAX has no such device here"):
        jax_device(torch.device("cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_donated_array_is_no_tensor_and_its_memory_is_the_programs(device: str) -> None:
    """On a GPU XLA writes the result to it, which is torch's; the CPU client declines."""
    tensor = torch.ones(64, device=device)
    array = to_jax(tensor)
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(array)
    result = to_torch(doubled)
    taken = result.data_ptr() == tensor.data_ptr()
    assert result.tolist() == [2.0] * 64 and tensor.tolist() == [2.0 if taken else 1.0] * 64
    assert taken == (device == "cuda")
    # A client may decline to donate; deleting is what donation does to a handle.
    if not array.is_deleted():
        array.delete()
    with pytest.raises(InteropError, match="deleted or donated"):
        to_torch(array)


def test_what_is_no_array_of_numbers_is_no_tensor() -> None:
    for given in (np.ones(4), torch.ones(4)):
        with pytest.raises(InteropError, match="to_torch: takes a jax.Array, this is a (ndarray|Tensor)"):
            to_torch(given)  # type: ignore[arg-type]
    with pytest.raises(InteropError, match="to_torch: a key<fry> array cannot be shared"):
        to_torch(jax.random.key(0))


def test_a_traced_array_is_no_tensor() -> None:
    with pytest.raises(InteropError, match="traced"):
        jax.jit(lambda x: to_torch(x).numel())(jax.numpy.ones(4))


def test_an_argument_shows_what_torch_wrote_since() -> None:
    """An array that is closed over may be a constant of the compiled program, so pools are arguments."""
    tensor = torch.ones(64)
    array = to_jax(tensor)
    total = jax.jit(lambda x: x.sum())
    assert float(total(array)) == 64.0
    tensor.fill_(3)
    assert float(total(array)) == 192.0


@pytest.mark.parametrize("device", DEVICES)
def test_handles_are_made_once_and_go_with_the_pool(device: str) -> None:
    made: list[int] = []

    def share(tensor: torch.Tensor) -> jax.Array:
        made.append(tensor.data_ptr())
        return to_jax(tensor)

    cache = HandleCache(share)
    pool = torch.zeros(2, 64, 2, 64, device=device)
    storage = StorageWeakRef(pool.untyped_storage())
    handles = [cache.get(pool[layer]) for _ in range(3) for layer in range(2)]
    assert all(handle is handles[i % 2] for i, handle in enumerate(handles))
    assert made == [pool[0].data_ptr(), pool[1].data_ptr()] and len(cache) == 2
    with torch.inference_mode():
        assert cache.get(pool[1]) is handles[1]
    del handles
    view = pool[1]
    del pool
    gc.collect()
    assert len(cache) == 2, "a view keeps the buffer, and its handles"
    del view
    gc.collect()
    assert len(cache) == 0 and storage.expired(), "the memory is free again"


def test_handles_do_not_survive_new_memory_of_the_same_tensor() -> None:
    weight = torch.nn.Parameter(torch.ones(64))
    cache = HandleCache()
    old = cache.get(weight)
    weight.data = torch.full((64,), 2.0)
    assert float(cache.get(weight)[0]) == 2.0 and float(old[0]) == 1.0 and len(cache) == 1


def test_a_cache_does_not_live_for_its_tensors() -> None:
    gc.collect()  # what other tests left
    tensor = torch.ones(64)
    before = len(jax.live_arrays())
    cache = HandleCache()
    cache.get(tensor)
    assert len(jax.live_arrays()) == before + 1
    del cache
    gc.collect()
    assert len(jax.live_arrays()) == before
