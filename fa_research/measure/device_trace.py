"""What ran on the device and when, as CUPTI saw it (through torch's profiler), and what being watched costs.

Only device activity is recorded: host operators would be slowed by their own records. Places in the trace are found by
delimiters, tiny kernels of a name that nothing else has, so that no clock of the host is compared with the device's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from fa_research.errors import TimingError
from fa_research.measure.cupti import CuptiWatch

_DELIMITER = "spin_kernel"  # of torch.cuda._sleep
_CHAIN = 256  # kernels of a calibration
_AHEAD_CYCLES = 1_000_000  # half a millisecond: the host is ahead when the calibrated graph starts


class TraceError(Exception):
    """There is no trace to go by; the message says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, copy or fill on the device; microseconds on the device's clock."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Segment:
    """What began between one delimiter and the next; `begin_us` is the end of the first."""

    begin_us: float
    kernels: tuple[Kernel, ...]

    @property
    def span_us(self) -> float:
        return max([kernel.end_us for kernel in self.kernels], default=self.begin_us) - self.begin_us


@dataclass(frozen=True, slots=True)
class TraceCost:
    """What tracing adds, in microseconds: to the idle time before each kernel of a graph, and to the host's launch of a
    kernel outside one. idle_us: between two kernels of a graph when nobody watches."""

    kernel_us: float
    launch_us: float
    idle_us: float


def delimit() -> None:
    """A delimiter on the current stream."""
    torch.cuda._sleep(1)


def trace(run: Callable[[], object]) -> list[Kernel]:
    """The device's activity while `run` ran, by start. Raises TraceError where the profiler cannot start."""
    watch = CuptiWatch()
    try:
        watch.__enter__()
    except (RuntimeError, TimingError) as error:
        raise TraceError(f"torch's profiler does not start ({error})") from error
    try:
        run()
    finally:
        watch.__exit__(None, None, None)
    found = watch.intervals()
    origin = min((i.start_ns for i in found), default=0)  # nanoseconds of the epoch do not fit into a float
    kernels = [Kernel(i.name, (i.start_ns - origin) / 1e3, (i.end_ns - origin) / 1e3) for i in found]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def segments(kernels: Sequence[Kernel], expected: int) -> list[Segment]:
    """What lies between the delimiters, of which `expected` were launched; what precedes the first is left out. Raises
    TraceError where the trace has another number of them."""
    borders = [i for i, kernel in enumerate(kernels) if _DELIMITER in kernel.name]
    if len(borders) != expected:
        raise TraceError(
            f"the profiler saw {len(borders)} of {expected} delimiters, and {len(kernels)} kernels in all"
        )
    ends = [*borders[1:], len(kernels)]
    return [
        Segment(kernels[begin].end_us, tuple(kernels[begin + 1 : end]))
        for begin, end in zip(borders, ends, strict=True)
    ]


@cache
def trace_cost(device: torch.device) -> TraceCost:
    """Measured once a process on a chain of tiny kernels, in a graph and launched one by one, with and without the
    profiler. Raises TraceError."""
    x = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(_CHAIN):
            x.add_(1)

    chain()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    graph_us = _untraced(graph.replay) / _CHAIN
    traced = _traced(graph.replay)
    idle = median(_idle_us(segment) for segment in traced) / _CHAIN
    kernel_us = max(0.0, median(segment.span_us for segment in traced) / _CHAIN - graph_us)
    launch = [_launching(chain) for _ in range(3)]
    watched: list[float] = []
    trace(lambda: watched.extend(_launching(chain) for _ in range(3)))
    launch_us = max(0.0, (median(watched) - median(launch)) / _CHAIN)
    return TraceCost(kernel_us, launch_us, max(0.0, idle - kernel_us))


def _untraced(replay: Callable[[], object]) -> float:
    events = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) * 1e3 for start, end in events[1:])


def _traced(replay: Callable[[], object]) -> list[Segment]:
    def run() -> None:
        for _ in range(5):
            torch.cuda._sleep(_AHEAD_CYCLES)
            delimit()
            replay()

    # Each replay is preceded by two delimiters: what lies behind the second one is the replay.
    return segments(trace(run), 10)[3::2]


def _idle_us(segment: Segment) -> float:
    return segment.span_us - sum(kernel.end_us - kernel.start_us for kernel in segment.kernels)


def _launching(chain: Callable[[], object]) -> float:
    """What the chain's launches take the host, with a queue that is empty before and holds all of them."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    chain()
    return (time.perf_counter_ns() - start) / 1e3
