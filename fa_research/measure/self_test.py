"""`measure.self_test`: references of known duration are timed first, and a machine whose timer is off is refused.

The references are kernels that spin for a set time on the device's own clock, a kernel that does nothing, and a chain
of loads, which takes longer when its data is not in the L2. Each timer in use is tested, on launches and on replays of
a graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from statistics import median

import torch

from fa_research.config import L2State, TimerKind
from fa_research.errors import TimingError
from fa_research.measure.timing import Timer

SHORT_US, LONG_US, HOST_US = 100.0, 400.0, 10_000.0
SAMPLES = 5
RATE_TOLERANCE = 0.03  # of the time between the short and the long kernel
HOST_TOLERANCE = 0.05  # the host sees the launch and the wait too
NOOP_LIMIT_US = 50.0
COLD_OVER_WARM = 1.2
_LOADS, _LINES = 128, 1 << 16  # of 128 bytes: 8 MiB, which any L2 holds together with what is chased
_ATTEMPTS = 3  # a neighbour's kernel in between is no fault of the clock


def judge(columns: dict[str, float]) -> tuple[str, ...]:
    """What is wrong with the numbers of one attempt; the names are those of `self_test`."""
    problems = []
    for name, value in columns.items():
        if name.endswith("_rate") and not abs(value - 1) <= RATE_TOLERANCE:
            problems.append(f"{name}={value:.3f}: a known time is off by more than {RATE_TOLERANCE:.0%}")
        elif name.endswith("_noop_us") and not 0 <= value <= NOOP_LIMIT_US:
            problems.append(
                f"{name}={value:.1f}: a kernel that does nothing takes from 0 to {NOOP_LIMIT_US:g} us"
            )
        elif name.endswith("_host_ratio") and not abs(value - 1) <= HOST_TOLERANCE:
            problems.append(
                f"{name}={value:.3f}: device and host clock differ by more than {HOST_TOLERANCE:.0%}"
            )
        elif name.endswith("_cold_over_warm") and not COLD_OVER_WARM <= value < math.inf:
            problems.append(
                f"{name}={value:.2f}: after a flush loads take at least {COLD_OVER_WARM} times as long"
            )
    return tuple(problems)


@cache
def self_test(device: torch.device, kind: TimerKind) -> dict[str, float]:
    """Columns `self_test_*` of a GPU and timer, once a process (about 0.1 s, with the kernels compiled).

    For each way of timing: `_rate` is timed over known, of the time between two kernels of known duration (1: right),
    `_noop_us` the time of nothing. `_host_ratio`: a known kernel by the host's clock. `_cold_over_warm`: a chain of
    loads after a flush over the same chain again. `_attempts`, where the first was off: how many it took. Empty where
    `cannot` says why.

    Raises TimingError where one of them is off in every attempt: then no time of this machine can be trusted.
    """
    if cannot():
        return {}
    problems: tuple[str, ...] = ()
    for attempt in range(1, _ATTEMPTS + 1):
        columns = _attempt(device, kind)
        problems = judge(columns)
        if not problems:
            return columns | ({"self_test_attempts": float(attempt)} if attempt > 1 else {})
    raise TimingError(
        f"the self-test of timing failed on this machine: {'; '.join(problems)}. Is another program using the GPU? "
        "measure.self_test=false measures all the same"
    )


def cannot() -> str | None:
    """Why there is no self-test on this machine's GPU; None where there is."""
    if torch.version.hip:
        return "its kernels read the clock of NVIDIA GPUs"
    return "its kernels need triton, which is not installed" if find_spec("triton") is None else None


def _attempt(device: torch.device, kind: TimerKind) -> dict[str, float]:
    timer = Timer(device, warmup=1, max_seconds=2.0, l2=L2State.cold, kind=kind)
    columns: dict[str, float] = {}
    for way, graph in ((kind.value, False), (f"{kind.value}_graph", True)):
        columns |= _timed(timer, graph, f"self_test_{way}")
    columns["self_test_host_ratio"] = _host_ratio(timer)
    columns["self_test_cold_over_warm"] = _cold_over_warm(timer)
    return columns


def _timed(timer: Timer, graph: bool, name: str) -> dict[str, float]:
    from fa_research.kernels.clock import hold

    took = torch.zeros(1, dtype=torch.int64, device=timer.device)

    def holding(microseconds: float) -> tuple[float, float]:
        """As timed, and as the kernel itself saw it (of the last run), microseconds."""
        timing = timer.time(lambda: hold(took, microseconds), SAMPLES, graph=graph)
        return timing.median_us, int(took) / 1e3

    (short, known_short), (long, known_long), (noop, _) = map(holding, (SHORT_US, LONG_US, 0.0))
    return {f"{name}_rate": (long - short) / (known_long - known_short), f"{name}_noop_us": noop}


def _host_ratio(timer: Timer) -> float:
    from fa_research.kernels.clock import hold

    took = torch.zeros(1, dtype=torch.int64, device=timer.device)
    timer.synchronize()
    start = time.perf_counter_ns()
    hold(took, HOST_US)
    timer.synchronize()
    return (time.perf_counter_ns() - start) / int(took)


def _cold_over_warm(timer: Timer) -> float:
    from fa_research.kernels.clock import LINE, chase

    order = torch.randperm(_LINES - 1, generator=torch.Generator().manual_seed(0))[:_LOADS] + 1
    chain = torch.cat([torch.zeros(1, dtype=torch.int64), order]) * LINE
    next_N = torch.zeros(_LINES * LINE, dtype=torch.int64)
    next_N[chain[:-1]] = chain[1:]
    next_N = next_N.to(timer.device)
    took, end = torch.zeros(2, dtype=torch.int64, device=timer.device).split(1)

    def median_ns(prepare: Callable[[], object]) -> float:
        taken = []
        for _ in range(SAMPLES):
            prepare()
            chase(next_N, took, end, _LOADS)
            taken.append(int(took))
        assert int(end) == int(chain[-1]), "the chain was not followed"
        return median(taken)

    cold = median_ns(timer.flush_l2)
    return cold / median_ns(lambda: None)
