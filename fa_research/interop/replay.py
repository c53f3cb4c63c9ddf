"""CUDA graphs of a custom call's work, by the addresses that it was given.

A compiled JAX program passes the same few addresses again and again. What a call does to them is captured the second
time and replayed from then on, so that the host's part is one launch: no planning, no wrapping, no kernel's own
Python. Only for work that reads lengths on the device, as a captured decode step does.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

_MOST = 512  # graphs kept for a call, which may be that of every layer of a program; then the oldest goes
_WHEN_FULL = 4  # times that addresses are met before they take another's place: a capture costs more than it saves once
_MOST_MET = 4096  # addresses that are counted
_pools: dict[int, Any] = {}  # by stream: what one stream replays in order may share memory
# One stream a device: cuBLAS keeps a workspace for every stream that it has seen.
_side: dict[int, torch.cuda.Stream] = {}

_one_at_a_time = threading.Lock()  # captures: programs of two Python threads share the stream that captures

Key = tuple[int, tuple[int, ...]]  # stream, addresses


class _Launch:
    """Launches a graph by the driver's own call: torch's would first have to make the stream its current one, which
    takes the host three times as long."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph  # owns what is launched
        self._executable = ctypes.c_void_p(graph.raw_cuda_graph_exec())

    def __call__(self, stream: int) -> None:
        if error := _driver().cuGraphLaunch(self._executable, ctypes.c_void_p(stream)):
            name = ctypes.c_char_p()
            _driver().cuGetErrorName(error, ctypes.byref(name))
            said = (name.value or b"unknown").decode()
            raise RuntimeError(f"{said} ({error}) from the launch of a captured call")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Replays:
    """The graphs of one call."""

    def __init__(self) -> None:
        self._graphs: dict[Key, _Launch] = {}
        self._met: Counter[Key] = Counter()

    def launch(self, stream: int, addresses: tuple[int, ...]) -> bool:
        """Launch the graph for these addresses on the stream of this handle. False: there is none."""
        launch = self._graphs.get((stream, addresses))
        if launch is not None:
            launch(stream)
        return launch is not None

    def run(self, work: Callable[[], None], stream: int, addresses: tuple[int, ...]) -> None:
        """Do `work`, whose tensors lie at `addresses`, on the current stream, whose handle is `stream`: as it is the
        first time, in a graph from then on."""
        key = stream, addresses
        full = len(self._graphs) >= _MOST
        if self._met[key] < (_WHEN_FULL if full else 1):
            work()  # compiles kernels and makes workspaces, which a capture cannot
            self._meet(key)
            return
        with _one_at_a_time:
            launch = _Launch(_capture(work, stream))
        if full:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._met[oldest]
        self._graphs[key] = launch
        launch(stream)

    def _meet(self, key: Key) -> None:
        if len(self._met) >= _MOST_MET:
            self._met.clear()
        self._met[key] += 1


def _capture(work: Callable[[], None], stream: int) -> torch.cuda.CUDAGraph:
    """Without `torch.cuda.graph`, which waits for the device and collects garbage; and in the mode that lets XLA's
    other threads allocate meanwhile."""
    device = torch.cuda.current_device()
    if stream not in _pools:
        _pools[stream] = torch.cuda.graph_pool_handle()
    if device not in _side:
        _side[device] = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side[device]):
        graph.capture_begin(pool=_pools[stream], capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # that the capture is spoilt; why is what was raised
                graph.capture_end()
            # Torch takes the pool to be in use by that capture still, and refuses it to the next.
            del _pools[stream], _side[device]
            raise
        graph.capture_end()
    return graph
