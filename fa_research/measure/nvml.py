"""Clocks, power and temperature of the GPU while it is timed, by NVML (package nvidia-ml-py), and what makes a row
suspect.

Of NVML's reasons for lower clocks these make a time suspect: the hardware's slowdown (clocks halved or worse), thermal
slowdown by hardware or driver, and the power brake. The driver's power cap does not: it is how a GPU at full load runs
its matrix products. Nor do clocks that somebody set: times are right, for those clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch

# nvmlClocksEventReasons of nvml.h
REASONS = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clocks",
}
_IDLE, _POWER_CAP = 0x1, 0x4
_SLOWED = 0x8 | 0x20 | 0x40 | 0x80
MOVED = 0.1  # share of the highest clock by which it may move while one thing is timed
_MOST_READINGS = 8  # in one wait


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the GPU; what NVML does not know of it is None. `power_w` is on recent GPUs the average of the last
    second, idle time included. `reasons` is NVML's bit mask."""

    sm_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    reasons: int | None = None

    @property
    def is_idle(self) -> bool:
        """Taken when the work was done already."""
        return bool((self.reasons or 0) & _IDLE)


def reason_names(mask: int) -> list[str]:
    """The names of the bits that are set; bits unknown here by their value."""
    names = [name for bit, name in REASONS.items() if mask & bit]
    rest = mask & ~sum(REASONS)
    return names + ([f"{rest:#x}"] if rest else [])


def columns(series: Sequence[Sequence[Reading]]) -> dict[str, Any]:
    """The row's columns: SM clock (median, lowest), power (median), temperature (highest), all reasons."""
    readings = [reading for readings in series for reading in readings]
    busy = [reading for reading in readings if not reading.is_idle] or readings
    clocks = [r.sm_clock_mhz for r in busy if r.sm_clock_mhz is not None]
    powers = [r.power_w for r in busy if r.power_w is not None]
    temperatures = [r.temperature_c for r in busy if r.temperature_c is not None]
    masks = [r.reasons for r in busy if r.reasons is not None]
    found: dict[str, Any] = {}
    if clocks:
        found |= {"gpu_sm_clock_MHz": median(clocks), "gpu_sm_clock_min_MHz": min(clocks)}
    if powers:
        found["gpu_power_W"] = median(powers)
    if temperatures:
        found["gpu_temperature_C"] = max(temperatures)
    if masks:
        found["gpu_throttle_reasons"] = ",".join(reason_names(_union(masks))) or "none"
    return found


def suspicions(series: Sequence[Sequence[Reading]]) -> list[str]:
    """Why times taken during these readings, one sequence for each thing timed, are not to be believed."""
    busy = [[reading for reading in readings if not reading.is_idle] for readings in series]
    slowed = _union(r.reasons or 0 for readings in busy for r in readings) & _SLOWED
    found = (
        [f"the GPU was slowed down while it was timed: {', '.join(reason_names(slowed))}"] if slowed else []
    )
    moves = [move for readings in busy if (move := _moved(readings)) is not None]
    if moves:
        low, high = max(moves, key=lambda move: 1 - move[0] / move[1])
        found.append(
            f"the SM clock moved from {low} to {high} MHz while one thing was timed, by more than {MOVED:.0%}, and no "
            "power cap explains it"
        )
    return found


def _moved(readings: Sequence[Reading]) -> tuple[int, int] | None:
    """Lowest and highest clock where they are too far apart."""
    clocks = [r.sm_clock_mhz for r in readings if r.sm_clock_mhz is not None]
    capped = any((r.reasons or 0) & _POWER_CAP for r in readings)
    if not clocks or capped or min(clocks) >= (1 - MOVED) * max(clocks):
        return None
    return min(clocks), max(clocks)


def _union(masks: Any) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


@dataclass
class Monitor:
    """Reads one GPU. `series` holds the readings of each thing timed."""

    gpu: Gpu
    series: list[list[Reading]] = field(default_factory=list)

    def begin_series(self) -> None:
        """The readings that follow are of another thing that is timed."""
        self.series.append([])

    def read_until(self, done: Callable[[], bool]) -> None:
        """Read once, and again while the GPU is at work."""
        for _ in range(_MOST_READINGS):
            self.series[-1].append(self.gpu.read())
            if done():
                return


class Gpu:
    """NVML's handle of one GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> Reading:
        nvml, handle = self._nvml, self._handle
        power = self._known(nvml.nvmlDeviceGetPowerUsage, handle)
        return Reading(
            self._known(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            None if power is None else power / 1e3,
            self._known(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            self._reasons(),
        )

    def _reasons(self) -> int | None:
        """Newer drivers and packages say events where older ones say throttling."""
        for word in ("Event", "Throttle"):
            function = getattr(self._nvml, f"nvmlDeviceGetCurrentClocks{word}Reasons", None)
            mask: int | None = None if function is None else self._known(function, self._handle)
            if mask is not None:
                return mask
        return None

    def driver(self) -> str | None:
        """The driver's version."""
        version = self._known(self._nvml.nvmlSystemGetDriverVersion)
        return None if version is None else str(version)

    def _known(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:  # not supported by this GPU, or not allowed
            return None


@cache
def find_gpu(device: torch.device) -> Gpu | str:
    """NVML's view of a CUDA device, found by its UUID or its place on the bus, since NVML counts GPUs without
    CUDA_VISIBLE_DEVICES; or, as text, why there is none."""
    try:
        import pynvml
    except ImportError:
        return 'nvidia-ml-py is not installed (pip install -e ".[nvml]")'
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}"))
    except (AttributeError, pynvml.NVMLError):
        pass
    try:
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(place))
    except (AttributeError, pynvml.NVMLError) as error:
        return f"NVML does not know the GPU that torch calls {device}: {error}"


def open_monitor(device: torch.device) -> tuple[Monitor | None, list[str]]:
    """A monitor of this GPU, or None with a note for the row; nothing of either on the CPU."""
    if device.type != "cuda":
        return None, []
    gpu = find_gpu(device)
    if isinstance(gpu, str):
        return None, [f"GPU clocks were not watched: {gpu}"]
    return Monitor(gpu), []
