"""CUDA graphs of whole decode steps, one for each batch size, largest first in one shared memory pool (as
SGLang and nano-vllm capture them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fa_research.config import CudaGraphConfig, GraphMode
from fa_research.errors import ConfigError
from fa_research.spec import Capabilities, GraphSupport

Step = Callable[[int], Tensor | None]
Prepare = Callable[[int], object]


class GraphSet:
    """Captures `step(batch_size)` for each size. `prepare(batch_size)`, where given, is host work that precedes
    each launch; it stays outside the graphs. The static buffers must hold padding only while this runs, so
    that the warm-up's writes go to the sink page. `step`'s result is a tensor in the graphs' pool,
    overwritten by each replay."""

    _WARMUPS = 2  # compiles kernels and lets libraries allocate their workspaces outside the capture

    def __init__(self, step: Step, batch_sizes: Sequence[int], prepare: Prepare | None = None) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, Tensor | None] = {}
        self._side = torch.cuda.Stream()  # one for all: cuBLAS keeps a workspace for every stream it has seen
        pool: Any = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for batch_size in sorted(batch_sizes, reverse=True):
                if prepare is not None:
                    prepare(batch_size)
                self._capture(step, batch_size, pool)

    def _capture(self, step: Step, batch_size: int, pool: Any) -> None:
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(self._WARMUPS):
                step(batch_size)
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = step(batch_size)
        self._graphs[batch_size], self._outputs[batch_size] = graph, output

    @property
    def batch_sizes(self) -> list[int]:
        return sorted(self._graphs)

    def replay(self, batch_size: int) -> Tensor | None:
        """Launch the graph of exactly this size on the current stream; its output, overwritten by the next
        replay."""
        self._graphs[batch_size].replay()
        return self._outputs[batch_size]


def resolve_graph_mode(
    config: CudaGraphConfig,
    device: torch.device,
    can: Capabilities,
    backend: str,
    *,
    metadata_per_layer: bool = False,
) -> GraphMode:
    """What `cuda_graph.mode` comes to on this device with this backend. `auto` captures where it can; an
    explicit `on` that cannot be raises ConfigError. With `metadata_per_layer`, plans of the host cannot be captured:
    a graph has no place between two layers for them."""
    mode = config.mode
    plans_between_layers = can.host_planning and metadata_per_layer
    capturable = can.cuda_graph is not GraphSupport.NEVER and not plans_between_layers
    if mode is GraphMode.auto:
        if device.type != "cuda":
            return GraphMode.simulate
        return GraphMode.on if capturable else GraphMode.off
    if mode is GraphMode.on and device.type != "cuda":
        raise ConfigError(
            f"cuda_graph.mode=on needs a CUDA device, this run is on {device.type}; use cuda_graph.mode=simulate or off"
        )
    if mode is GraphMode.on and plans_between_layers:
        raise ConfigError(
            f"cuda_graph.mode=on: backend={backend} plans on the host, which a graph cannot repeat before every layer "
            "(backend.metadata=per_layer); use cuda_graph.mode=off or backend.metadata=shared"
        )
    if mode is GraphMode.on and not capturable:
        raise ConfigError(
            f"cuda_graph.mode=on: backend={backend} cannot be captured; use cuda_graph.mode=off or simulate"
        )
    return mode
