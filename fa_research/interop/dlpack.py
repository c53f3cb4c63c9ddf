"""The same memory as a torch tensor and as a JAX array (DLPack), never a copy: what cannot be shared is an error.

Order on the GPU: `to_jax` makes JAX computations that take the array wait for what the current torch stream holds at
the call; `to_torch` makes the current torch stream wait for the computation that makes the array. So torch writes
before `to_jax`, JAX reads, and torch may write again on that stream after `to_torch` of a result of the same
computation, and the host waits for nothing. What one side lets go of is given away once the other has read it. On the
CPU torch runs at once, and `to_torch` waits for the result.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa_research.errors import InteropError
from fa_research.interop.deferred_release import keep_until_read, release_ready

if TYPE_CHECKING:
    import jax

MISSING = "the jax package is not installed (pip install -e '.[jax]')"
# Bytes. XLA's CPU client takes no less; on a GPU its kernels assume so much of their arguments.
ALIGNMENT = {"cpu": 64, "cuda": 16}
WITHOUT_X64 = {torch.float64, torch.int64, torch.uint64, torch.complex128}


def import_jax() -> ModuleType:
    """The jax module. Raises InteropError where it is not installed. Unless the environment says otherwise, JAX then
    takes GPU memory as it needs it: its default of 75 % at once would leave torch without."""
    if importlib.util.find_spec("jax") is None:
        raise InteropError(f"JAX: {MISSING}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax


def reasons_against_jax(device: torch.device) -> tuple[str, ...]:
    """Why JAX cannot share memory with torch on this device, as far as can be told without importing JAX (which would
    take seconds, and memory of the GPU)."""
    if importlib.util.find_spec("jax") is None:
        return (MISSING,)
    if device.type not in ALIGNMENT:
        return ()  # the backend's capabilities say which devices there are
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    if device.type == "cuda" and not any("cuda" in name for name in plugins):
        return ("JAX has no CUDA plugin, torch is on a GPU (pip install 'jax[cuda13]', or use device=cpu)",)
    return ()


def x64_enabled() -> bool:
    """Whether JAX has 64-bit types; without `JAX_ENABLE_X64` it makes them 32-bit."""
    if "jax" in sys.modules:
        return bool(import_jax().config.jax_enable_x64)
    return os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "on", "yes", "y", "t")


@cache
def jax_device(device: torch.device) -> jax.Device:
    """The JAX device that is this torch device. Raises InteropError where JAX has none."""
    jax = import_jax()
    try:
        devices = jax.devices("gpu" if device.type == "cuda" else device.type)
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS names what is not there
        raise InteropError(
            f"device={device}: JAX has no such device here ({error or type(error).__name__}); "
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        ) from None
    index = (device.index or 0) if device.type == "cuda" else 0
    matching = [d for d in devices if (d.local_hardware_id or 0) == index]
    if not matching:
        raise InteropError(f"device={device}: JAX sees only {', '.join(map(str, devices))}")
    return matching[0]


def reasons_against_sharing(tensor: Tensor) -> tuple[str, ...]:
    """Why JAX cannot read this tensor where it lies; empty if it can."""
    device = tensor.device.type
    if tensor.layout is not torch.strided or tensor.is_nested:
        return (f"layout {tensor.layout}: JAX shares dense tensors only; share what they are made of",)
    if device not in ALIGNMENT:
        return (f"device {device}: JAX shares memory with torch on cpu and cuda only",)
    reasons = []
    if tensor.dtype in WITHOUT_X64 and not x64_enabled():
        reasons.append(
            f"dtype {_name(tensor.dtype)}: JAX makes it 32-bit; set JAX_ENABLE_X64=1, or convert it first"
        )
    if not _is_compact(tensor):
        reasons.append(
            f"strides {tensor.stride()} of shape {tuple(tensor.shape)}: DLPack to JAX takes tensors without gaps or "
            "repeats; share what it is a view of, or call .contiguous() first"
        )
    if not is_aligned(tensor):
        reasons.append(
            f"address {tensor.data_ptr():#x}: not a multiple of {ALIGNMENT[device]} bytes; share what it is a view "
            "of and slice in JAX, or clone it"
        )
    return tuple(reasons)


def is_aligned(tensor: Tensor) -> bool:
    """Whether its address, on a CPU or a GPU, is one that JAX takes."""
    return not tensor.numel() or tensor.data_ptr() % ALIGNMENT[tensor.device.type] == 0


def to_jax(tensor: Tensor) -> jax.Array:
    """The tensor's memory as a JAX array of its shape and dtype; gradients do not cross. It keeps the memory alive.

    JAX takes arrays to be immutable: write to the tensor only when no computation that reads it is under way (see the
    head of this file), and pass the array to jitted functions as an argument, since one that is closed over is a
    constant of the compiled program. Do not donate it unless the tensor is of no use any more: on a GPU XLA writes the
    result to its memory. Raises InteropError where sharing takes a copy."""
    reasons = reasons_against_sharing(tensor)
    if reasons:
        raise InteropError(
            f"a tensor of {tuple(tensor.shape)} cannot be shared with JAX: {'; '.join(reasons)}"
        )
    jax = import_jax()
    jax_device(tensor.device)
    try:
        array: Any = jax.dlpack.from_dlpack(tensor.detach(), copy=False)
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        raise InteropError(
            f"a {_name(tensor.dtype)} tensor of {tuple(tensor.shape)} on {tensor.device} cannot be shared: {error}"
        ) from error
    release_ready()
    if tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise InteropError(f"JAX copied a {_name(tensor.dtype)} tensor of {tuple(tensor.shape)} on import")
    return array


def to_torch(array: jax.Array) -> Tensor:
    """The array's memory as a tensor, which must not be written to while JAX may read the array. It keeps the memory
    alive, on a GPU until what the current torch stream holds at its death has run. Raises InteropError for an array
    that is deleted (donated), traced or on several devices."""
    jax = import_jax()
    if not isinstance(array, jax.Array):
        raise InteropError(f"to_torch: takes a jax.Array, this is a {type(array).__name__}")
    if isinstance(array, jax.core.Tracer):
        raise InteropError("to_torch: this array is traced; call it outside jax.jit")
    if array.is_deleted():
        raise InteropError("to_torch: the array was deleted or donated; the memory is no longer its own")
    if len(array.devices()) != 1:
        raise InteropError(f"to_torch: the array is on {len(array.devices())} devices, a tensor is on one")
    if next(iter(array.devices())).platform == "cpu":
        array.block_until_ready()
    try:
        tensor = torch.from_dlpack(array)
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        raise InteropError(f"to_torch: a {array.dtype} array cannot be shared with torch: {error}") from error
    assert not tensor.numel() or tensor.data_ptr() == array.unsafe_buffer_pointer()
    if tensor.is_cuda:
        keep_until_read(array, tensor)
        release_ready()
    return tensor


class HandleCache:
    """JAX handles of tensors that are shared again and again: made once per tensor, dropped when it is freed.

    A handle keeps the memory alive, but not the tensor object that stands for it: where a tensor is a view, that is
    what it is a view of (a pool's buffer). When that object dies, its handles go, and the memory with them."""

    def __init__(self, share: Callable[[Tensor], jax.Array] = to_jax) -> None:
        self._share = share
        self._handles: dict[int, dict[tuple[Any, ...], jax.Array]] = {}
        self._owners: dict[int, weakref.ref[Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._handles.values()))

    def get(self, tensor: Tensor) -> jax.Array:
        """`to_jax(tensor)`, remembered. It orders nothing: a computation needs one argument that is shared anew."""
        owner = tensor if tensor._base is None else tensor._base
        known = self._handles.get(id(owner))
        if known is None:
            known = self._handles[id(owner)] = {}
            self._owners[id(owner)] = weakref.ref(owner, self._forget(id(owner)))
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in known:
            # Memory that the owner has left (tensor.data = ...) is let go.
            for old in [old for old in known if not _within(old[0], owner)]:
                del known[old]
            known[key] = self._share(tensor)
        return known[key]

    def _forget(self, owner: int) -> Callable[[object], None]:
        handles, owners = self._handles, self._owners  # not self: the callback must not keep the cache alive

        def forget(_: object) -> None:
            handles.pop(owner, None)
            owners.pop(owner, None)

        return forget


def _within(address: int, owner: Tensor) -> bool:
    storage = owner.untyped_storage()
    return storage.data_ptr() <= address < storage.data_ptr() + max(storage.nbytes(), 1)


def _is_compact(tensor: Tensor) -> bool:
    """Whether the elements are a permutation of one gapless block."""
    expected = 1
    dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    for stride, size in sorted(dims):
        if stride != expected:
            return False
        expected *= size
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
