"""Python functions on torch tensors as XLA custom calls, in this process and without copies: a handler for XLA's C
interface, written with ctypes so that nothing has to be compiled or installed.

The addresses that XLA passes are wrapped as tensors that own nothing. They are valid during the call only; the wrappers
are kept by address, because a compiled program passes the same ones again and again.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fa_research.interop.dlpack import import_jax
from fa_research.interop.replay import Replays
from fa_research.interop.xla_structs import HANDLER, ErrorArgs, Frame, StreamArgs

TARGET = "fa_research_call"
_MAX_WRAPPED = 1024  # addresses remembered per call; past that they are forgotten all at once
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
_METADATA = 1  # XLA_FFI_Extension_Metadata
_MAJOR, _MINOR = 0, 4  # of the interface that the structs below are; jaxlib 0.10 has 0.3

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(slots=True)
class Call:
    """One call site: what runs, on which torch device, and the shapes that its program was compiled for. `replays`: on
    a GPU the work is captured and replayed."""

    function: Function
    device: torch.device
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    replays: Replays | None = None
    wrapped: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by (argument, address)

    def run(self, addresses: tuple[int, ...]) -> None:
        """The function on the tensors at these addresses."""
        self.function(*self.tensors(addresses))

    def tensors(self, addresses: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs at these addresses. Each is remembered for itself: the pool stays where it is while
        queries and outputs move from call to call."""
        found = [self._tensor(*place) for place in enumerate(addresses)]
        return found[: len(self.inputs)], found[len(self.inputs) :]

    def _tensor(self, argument: int, address: int) -> Tensor:
        known = self.wrapped.get((argument, address))
        if known is None:
            if len(self.wrapped) >= _MAX_WRAPPED:
                self.wrapped.clear()
            count = len(self.inputs)
            shape = self.inputs[argument] if argument < count else self.outputs[argument - count]
            known = self.wrapped[argument, address] = _wrap(address, *shape, self.device)
        return known


_calls: list[Call] = []  # compiled programs name them by index, so none is ever taken away
_streams: dict[int, Any] = {}


def add_call(call: Call) -> int:
    """Make a call known; its number is the attribute `call` of the custom call."""
    _register()
    _calls.append(call)
    return len(_calls) - 1


def _handle(pointer: Any, platform: str) -> int | None:
    """The custom call; what it raises becomes XLA's error, and so JAX's."""
    frame = pointer.contents
    if frame.extension:
        extension = frame.extension.contents
        if extension.type == _METADATA:
            version = extension.metadata.contents.version
            version.major, version.minor = _MAJOR, min(frame.api.contents.version.minor, _MINOR)
            return None
    try:
        _run(frame, platform)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".encode()
        args = ErrorArgs(ctypes.sizeof(ErrorArgs), None, text, _INTERNAL)
        result: int | None = frame.api.contents.error_create(ctypes.addressof(args))
        return result
    return None


def _run(frame: Frame, platform: str) -> None:
    call = _calls[frame.attributes.items[0].contents.value[0]]
    if call.device.type != platform:
        raise RuntimeError(
            f"compiled for {platform}, asked for device={call.device.type}; pass device={platform!r}"
        )
    addresses = (*frame.arguments.addresses(), *frame.results.addresses())
    if platform == "cpu":
        with torch.inference_mode():
            call.run(addresses)
        return
    stream, replays = _stream(frame), call.replays
    if replays is not None and replays.launch(stream, addresses):
        return
    if stream not in _streams:
        _streams[stream] = torch.cuda.ExternalStream(stream, device=call.device)
    with torch.inference_mode(), torch.cuda.stream(_streams[stream]):
        if replays is None:
            call.run(addresses)
        else:
            replays.run(lambda: call.run(addresses), stream, addresses)


def _stream(frame: Frame) -> int:
    """XLA's stream: what runs on it comes after what makes the inputs, and before what reads the outputs."""
    args = StreamArgs(ctypes.sizeof(StreamArgs), None, frame.context, None)
    if frame.api.contents.stream_get(ctypes.addressof(args)):
        raise RuntimeError("XLA gives no stream")
    return args.stream or 0


def _wrap(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor over memory that it does not own."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    tensor = torch.as_tensor(_CudaArray(address, count * dtype.itemsize), device=device)
    if tensor.data_ptr() != address:  # torch copies what lies on another GPU
        raise RuntimeError(
            f"XLA's buffer is on another GPU than {device}, torch's current one when the call was traced; trace it for "
            "each GPU by a jax.jit of its own, with torch.cuda.set_device before"
        )
    return tensor.view(dtype).view(shape)


class _CudaArray:
    """Bytes on the GPU, for torch (the CUDA array interface has no bfloat16)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


_handlers: dict[str, Any] = {}  # ctypes functions must outlive the registration


def _register() -> None:
    if _handlers:
        return
    jax = import_jax()
    for platform, name in (("cpu", "cpu"), ("cuda", "CUDA")):
        handler = HANDLER(lambda frame, platform=platform: _handle(frame, platform))
        _handlers[platform] = handler
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=name)
