"""Time on the device with events, on the CPU with a clock; L2 cold unless told otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from fa_research.config import L2State
from fa_research.workloads.base import nothing

_BURST = 16  # launches in a row without waiting: the queue neither fills up nor runs dry
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today


@dataclass(frozen=True, slots=True)
class Timing:
    """Samples in microseconds, and how they were taken: `cuda_events`, `cuda_graph` (events around a replay) or
    `perf_counter`."""

    samples_us: tuple[float, ...]
    method: str
    l2: str

    @property
    def median_us(self) -> float:
        return median(self.samples_us)

    def metrics(self, name: str) -> dict[str, float]:
        """Median, 10th and 90th percentile, count, as columns named after `name`."""
        deciles = (
            quantiles(self.samples_us, n=10, method="inclusive")
            if len(self.samples_us) > 1
            else [self.samples_us[0]] * 9
        )
        return {
            f"{name}_us": self.median_us,
            f"{name}_p10_us": deciles[0],
            f"{name}_p90_us": deciles[-1],
            f"{name}_count": len(self.samples_us),
        }


class Timer:
    """Times callables that launch work and wait for nothing.

    warmup: untimed calls first. max_seconds: stop sampling when this much wall time has gone (two samples at least).
    """

    def __init__(self, device: torch.device, *, warmup: int, max_seconds: float, l2: L2State) -> None:
        self.device = device
        self.warmup = warmup
        self.max_seconds = max_seconds
        self.l2 = l2
        self._flush: torch.Tensor | None = None

    def time(
        self,
        run: Callable[[], object],
        samples: int,
        *,
        graph: bool = False,
        reset: Callable[[], object] = nothing,
    ) -> Timing:
        """`samples` timings of `run`; with `graph` (GPU only), of a CUDA graph that holds it. `reset` is called before
        the warm-up and before the samples."""
        if self.device.type != "cuda":
            return self._time_cpu(run, samples, reset)
        if graph:
            run = self._captured(run)
        return self._time_cuda(run, samples, reset, "cuda_graph" if graph else "cuda_events")

    def host_time(
        self, run: Callable[[], object], samples: int, *, reset: Callable[[], object] = nothing
    ) -> Timing:
        """What `run` costs the host, nothing waited for."""
        reset()
        taken: list[float] = []
        deadline = time.monotonic() + self.max_seconds
        while len(taken) < samples and (len(taken) < 2 or time.monotonic() < deadline):
            if len(taken) % _BURST == 0:
                self.synchronize()
            start = time.perf_counter_ns()
            run()
            taken.append((time.perf_counter_ns() - start) / 1e3)
        self.synchronize()
        return Timing(tuple(taken), "perf_counter", "any")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _time_cuda(
        self, run: Callable[[], object], samples: int, reset: Callable[[], object], method: str
    ) -> Timing:
        reset()
        for _ in range(self.warmup):
            run()
        reset()
        self.synchronize()
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        deadline = time.monotonic() + self.max_seconds
        while len(events) < samples and (len(events) < 2 or time.monotonic() < deadline):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.prepare_l2()
            start.record()
            run()
            end.record()
            events.append((start, end))
            if len(events) % 32 == 0:
                self.synchronize()  # bounds the queue, so that max_seconds means something
        self.synchronize()
        return Timing(tuple(start.elapsed_time(end) * 1e3 for start, end in events), method, self.l2.value)

    def _time_cpu(self, run: Callable[[], object], samples: int, reset: Callable[[], object]) -> Timing:
        taken: list[float] = []
        deadline = time.monotonic() + self.max_seconds
        reset()
        for _ in range(min(self.warmup, 1)):
            run()
        reset()
        while len(taken) < samples and (len(taken) < 2 or time.monotonic() < deadline):
            start = time.perf_counter_ns()
            run()
            taken.append((time.perf_counter_ns() - start) / 1e3)
        return Timing(tuple(taken), "perf_counter", "any")

    def prepare_l2(self) -> None:
        """Push what the last call left out of the L2. It also keeps the device busy while the host launches `run`."""
        if self.l2 is L2State.cold:
            if self._flush is None:
                self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)
            self._flush.zero_()

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
