"""Time on the device with events or as CUPTI records it, on the CPU with a clock; L2 cold unless told otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from statistics import median, quantiles
from typing import Protocol

import torch

from fa_research.config import L2State, TimerKind
from fa_research.measure.cupti import CuptiWatch
from fa_research.measure.nvml import Monitor
from fa_research.workloads.base import no_reset

_BURST = 16  # launches in a row without waiting: the queue neither fills up nor runs dry
_SAMPLES_A_WAIT = 32  # bounds the queue, so that max_seconds means something
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today


@dataclass(frozen=True, slots=True)
class Timing:
    """Samples in microseconds, and how they were taken: `cuda_events`, `cuda_graph` (events around a replay), `cupti`
    (the time in which some kernel ran) or `perf_counter`. `spans_us`, of cupti alone: from the first kernel's start to
    the last one's end."""

    samples_us: tuple[float, ...]
    method: str
    l2: str
    spans_us: tuple[float, ...] = ()

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
        columns = {
            f"{name}_us": self.median_us,
            f"{name}_p10_us": deciles[0],
            f"{name}_p90_us": deciles[-1],
            f"{name}_count": len(self.samples_us),
        }
        return columns | ({f"{name}_span_us": median(self.spans_us)} if self.spans_us else {})


class Watch(Protocol):
    """Brackets samples; `read` gives their times in microseconds when the device is done, and their spans."""

    method: str

    def begin(self) -> object: ...

    def end(self) -> object: ...

    def read(self) -> tuple[list[float], list[float]]: ...


class _ClockWatch:
    method = "perf_counter"

    def __init__(self) -> None:
        self._taken: list[float] = []

    def begin(self) -> None:
        self._start = time.perf_counter_ns()

    def end(self) -> None:
        self._taken.append((time.perf_counter_ns() - self._start) / 1e3)

    def read(self) -> tuple[list[float], list[float]]:
        return self._taken, []


class _EventWatch:
    method = "cuda_events"

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def begin(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    end = begin

    def read(self) -> tuple[list[float], list[float]]:
        starts, ends = self._events[::2], self._events[1::2]
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)], []


class Timer:
    """Times callables that launch work and wait for nothing.

    warmup: untimed calls first. max_seconds: stop sampling when this much wall time has gone (two samples at least).
    kind: how a GPU's time is taken. monitor: reads clocks while the device works and the host only waits for it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        warmup: int,
        max_seconds: float,
        l2: L2State,
        kind: TimerKind = TimerKind.events,
        monitor: Monitor | None = None,
    ) -> None:
        self.device = device
        self.warmup = warmup
        self.max_seconds = max_seconds
        self.l2 = l2
        self.kind = kind
        self.monitor = monitor
        self._flush: torch.Tensor | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def time(
        self,
        run: Callable[[], object],
        samples: int,
        *,
        graph: bool = False,
        reset: Callable[[], object] = no_reset,
    ) -> Timing:
        """`samples` timings of `run`; with `graph` (GPU only), of a CUDA graph that holds it. `reset` is called before
        the warm-up and before the samples."""
        if graph and self.on_gpu:
            run = self.captured(run)
        reset()
        for _ in range(self.warmup if self.on_gpu else min(self.warmup, 1)):
            run()
        reset()
        timing = self.time_each(repeat(run, samples))
        replayed = graph and timing.method == "cuda_events"
        return Timing(timing.samples_us, "cuda_graph", timing.l2, timing.spans_us) if replayed else timing

    def time_each(
        self, runs: Iterable[Callable[[], object]], *, fewest: int = 2, together: int = _SAMPLES_A_WAIT
    ) -> Timing:
        """One sample of each of `runs`, in this order, without a warm-up.

        together: samples that are launched before they are waited for. fewest: samples that are taken whatever
        `max_seconds` says.
        """
        self.synchronize()
        watch, recording = self._watch()
        if self.monitor is not None:
            self.monitor.begin_series()
        deadline = time.monotonic() + self.max_seconds
        with recording:
            for taken, run in enumerate(runs):
                if taken >= fewest and time.monotonic() >= deadline:
                    break
                self.prepare_l2()
                watch.begin()
                run()
                watch.end()
                if (taken + 1) % together == 0:
                    self._wait(together > 1)
            self._wait(together > 1)
        samples, spans = watch.read()
        l2 = self.l2.value if self.on_gpu else "any"
        return Timing(tuple(samples), watch.method, l2, tuple(spans))

    def host_time(
        self, run: Callable[[], object], samples: int, *, reset: Callable[[], object] = no_reset
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
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def flush_l2(self) -> None:
        """Write so much that nothing else is left in the L2. It also keeps the device busy while the host launches."""
        if self._flush is None:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of `run`, which runs once before; call the result to replay it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _watch(self) -> tuple[Watch, AbstractContextManager[object]]:
        if not self.on_gpu:
            return _ClockWatch(), nullcontext()
        if self.kind is TimerKind.cupti:
            watch = CuptiWatch()
            return watch, watch
        return _EventWatch(), nullcontext()

    def prepare_l2(self) -> None:
        """What comes before each sample: a flush where L2 is to be cold."""
        if self.on_gpu and self.l2 is L2State.cold:
            self.flush_l2()

    def _wait(self, monitored: bool) -> None:
        """Until the device is done. Clocks are read here: the samples' work is queued and the host has nothing to do,
        so that reading delays no launch and sees the clocks of the work."""
        if not self.on_gpu:
            return
        if self.monitor is not None and monitored:
            done = torch.cuda.Event()
            done.record()
            self.monitor.read_until(done.query)
        self.synchronize()
