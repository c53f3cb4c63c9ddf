"""CUDA graphs of a custom call's work, by the addresses that it was given.

A compiled JAX program passes the same few addresses again and again. What a call does to them is captured the second
time and replayed from then on, so that the host's part is one launch: no planning, no wrapping, no kernel's own
Python. Only for work that reads lengths on the device, as a captured decode step does.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

_MOST = 256  # graphs kept for a call, which may be that of every layer of a program
_MOST_SEEN = 1024  # addresses met once
_pools: dict[int, Any] = {}  # by stream: what one stream replays in order may share memory
_side: list[torch.cuda.Stream] = []  # one for all: cuBLAS keeps a workspace for every stream that it has seen

_one_at_a_time = threading.Lock()  # captures: programs of two Python threads share the stream that captures

Addresses = tuple[int, ...]


class _Launch:
    """Launches a graph by the driver's own call: torch's would first have to make the stream its current one, which
    takes the host three times as long."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph  # owns what is launched
        self._executable = ctypes.c_void_p(graph.raw_cuda_graph_exec())

    def __call__(self, stream: int) -> None:
        if error := _driver().cuGraphLaunch(self._executable, ctypes.c_void_p(stream)):
            raise RuntimeError(f"CUDA error {error} from the launch of a captured call")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Replays:
    """The graphs of one call."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, Addresses], _Launch] = {}
        self._seen: set[tuple[int, Addresses]] = set()

    def launch(self, stream: int, addresses: Addresses) -> bool:
        """Launch the graph for these addresses on the stream of this handle. False: there is none yet."""
        launch = self._graphs.get((stream, addresses))
        if launch is not None:
            launch(stream)
        return launch is not None

    def run(self, work: Callable[[], None], stream: int, addresses: Addresses) -> None:
        """Do `work`, whose tensors lie at `addresses`, on the current stream, whose handle is `stream`: as it is the
        first time, in a graph from then on."""
        key = stream, addresses
        if key not in self._seen:
            self._meet(key)
            work()  # compiles kernels and makes workspaces, which a capture cannot
            return
        with _one_at_a_time:
            launch = _Launch(self._capture(work, stream))
        self._keep(key, launch)
        launch(stream)

    def _meet(self, key: tuple[int, Addresses]) -> None:
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(key)

    def _keep(self, key: tuple[int, Addresses], launch: _Launch) -> None:
        if (
            len(self._graphs) >= _MOST
        ):  # any one: a program with more layers would find the oldest gone each time
            del self._graphs[random.choice(list(self._graphs))]
        self._graphs[key] = launch

    def _capture(self, work: Callable[[], None], stream: int) -> torch.cuda.CUDAGraph:
        """Without `torch.cuda.graph`, which waits for the device and collects garbage; and in the mode that lets
        XLA's other threads allocate meanwhile."""
        if stream not in _pools:
            _pools[stream] = torch.cuda.graph_pool_handle()
        if not _side:
            _side.append(torch.cuda.Stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_side[0]):
            graph.capture_begin(pool=_pools[stream], capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is spoilt; why is what was raised
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph
