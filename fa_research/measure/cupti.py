"""`measure.timer=cupti`: when each kernel ran, as CUPTI records it, read through Kineto, part of CUDA builds of torch.

Each sample stands between two launches of a kernel that does next to nothing; what the GPU did between them is of the
sample, launched one by one or by a graph. Copies to the host are left out: no kernel waits for them, as it does for
copies from it (a plan's, say).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from fa_research.config import TimerKind
from fa_research.errors import ConfigError, TimingError

_MARK = "spin_kernel"  # of torch.cuda._sleep: nothing else runs it
_COPY_TO_HOST = "Memcpy DtoH"
_FIRST_CUDA_THAT_DETACHES = (12, 6)  # pytorch/pytorch#150957


@dataclass(frozen=True, slots=True)
class Interval:
    """One activity of the GPU, in nanoseconds of CUPTI's clock."""

    name: str
    start_ns: int
    end_ns: int


def busy_ns(intervals: Iterable[Interval]) -> int:
    """The time in which at least one of them ran: kernels that overlap count once."""
    total, until = 0, 0
    for interval in sorted(intervals, key=lambda i: i.start_ns):
        total += max(0, interval.end_ns - max(interval.start_ns, until))
        until = max(until, interval.end_ns)
    return total


def span_ns(intervals: Sequence[Interval]) -> int:
    """From the first start to the last end; 0 for none."""
    return max(i.end_ns for i in intervals) - min(i.start_ns for i in intervals) if intervals else 0


def split_by_marks(intervals: Iterable[Interval], samples: int) -> list[list[Interval]]:
    """What ran between the two marks of each sample, copies to the host left out.

    Raises TimingError where there are not two marks a sample: then records were lost.
    """
    ordered = sorted(intervals, key=lambda i: (i.start_ns, i.end_ns))
    groups: list[list[Interval]] = [[]]
    for interval in ordered:
        if _MARK in interval.name:
            groups.append([])
        elif not interval.name.startswith(_COPY_TO_HOST):
            groups[-1].append(interval)
    if len(groups) != 2 * samples + 1:
        raise TimingError(
            f"measure.timer=cupti: {len(groups) - 1} of {2 * samples} marks were recorded. CUPTI may be closed to this "
            "user (the driver's NVreg_RestrictProfilingToAdminUsers) or in use by another profiler; "
            "use measure.timer=events"
        )
    return groups[1::2]


def cupti_problem(device: torch.device) -> str | None:
    """Why `measure.timer=cupti` cannot be had here; None where it can."""
    if device.type != "cuda":
        return f"it times CUDA kernels, this run is on {device.type}"
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return "this build of torch has no CUPTI (its profiler lists no CUDA activities)"
    return detach_problem(torch.version.cuda)


def detach_problem(cuda: str | None) -> str | None:
    """Why the profiler could not be detached after use with this version of CUDA ("12.8"); None where it can."""
    version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
    if version >= _FIRST_CUDA_THAT_DETACHES:
        return None
    needed = ".".join(map(str, _FIRST_CUDA_THAT_DETACHES))
    return f"CUDA graphs survive the end of profiling from CUDA {needed} on, this torch has CUDA {cuda}"


def check_timer(kind: TimerKind, device: torch.device) -> None:
    """Raises ConfigError where the timer that was asked for cannot be had on this device."""
    if kind is TimerKind.cupti and (problem := cupti_problem(device)):
        raise ConfigError(f"measure.timer=cupti: {problem}; use measure.timer=events")


class CuptiWatch:
    """Records while entered; `begin` and `end` bracket samples. Afterwards CUPTI is detached. Entering it raises
    TimingError where it could not be detached: then every later launch of this process would be slower."""

    method = "cupti"

    def __init__(self) -> None:
        self._samples = 0
        # Not torch.profiler.profile, which imports torch._inductor: that takes seconds.
        self._profile: Any = torch.autograd.profiler.profile(
            use_cpu=False, use_device="cuda", use_kineto=True
        )

    def __enter__(self) -> Self:
        if problem := detach_problem(torch.version.cuda):
            raise TimingError(problem)
        _detach_at_the_end()
        torch.cuda.synchronize()
        with _no_warnings():
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize()
        with _no_warnings():
            self._profile.__exit__(kind, error, trace)

    def begin(self) -> None:
        torch.cuda._sleep(1)

    def end(self) -> None:
        torch.cuda._sleep(1)
        self._samples += 1

    def read(self) -> tuple[list[float], list[float]]:
        """Busy time and span of each sample, microseconds. Raises TimingError where records are missing."""
        groups = split_by_marks(self.intervals(), self._samples)
        return [busy_ns(group) / 1e3 for group in groups], [span_ns(group) / 1e3 for group in groups]

    def intervals(self) -> list[Interval]:
        """What the GPU did while it was entered."""
        on_device = torch.autograd.DeviceType.CUDA
        return [
            Interval(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in self._profile.kineto_results.events()
            if event.device_type() == on_device and not event.is_user_annotation()
        ]


def _detach_at_the_end() -> None:
    """Tell Kineto to finalize CUPTI when a profile ends, and to initialize it again for the next one. While CUPTI stays
    subscribed, the host needs 5 to 20 times as long for each launch of a CUDA graph (4 and 86 us for 400 kernels on an
    H200). Kineto reads both variables at each profile; torch's own profiler may have set them otherwise."""
    os.environ["TEARDOWN_CUPTI"] = "1"
    os.environ.pop("DISABLE_CUPTI_LAZY_REINIT", None)


def _no_warnings() -> warnings.catch_warnings:
    """The profiler's own warnings differ between versions and say nothing to whoever times."""
    return warnings.catch_warnings(action="ignore")
