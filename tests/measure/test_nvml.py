"""What readings of the GPU come to: columns, and the reasons to doubt a time. Masks are NVML's."""

from __future__ import annotations

import pytest

from fa_research.measure.nvml import MOVED, REASONS, Monitor, Reading, columns, reason_names, suspicions

# Of an H200: at full load on a matrix product (power capped), decoding, too hot, and after the work was done.
CAPPED = [Reading(1980, 640.1, 55, 0x4), Reading(1545, 698.7, 58, 0x4), Reading(1530, 699.2, 58, 0x4)]
DECODING = [Reading(1980, 430.5, 51, 0x0), Reading(1980, 455.0, 52, 0x0), Reading(1965, 450.2, 52, 0x0)]
HOT = [Reading(1980, 600.0, 86, 0x0), Reading(1900, 580.0, 87, 0x20)]
DONE = Reading(345, 120.0, 40, 0x1)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0x0, []),
        (0x4, ["sw_power_cap"]),
        (0x48, ["hw_slowdown", "hw_thermal_slowdown"]),
        (0x1000, ["0x1000"]),
    ],
)
def test_reasons_have_names(mask: int, names: list[str]) -> None:
    assert reason_names(mask) == names


def test_the_names_are_nvmls() -> None:
    nvml = pytest.importorskip("pynvml")
    names = {
        "idle": "GpuIdle", "application_clocks": "ApplicationsClocksSetting", "sw_power_cap": "SwPowerCap",
        "hw_slowdown": "HwSlowdown", "sync_boost": "SyncBoost", "sw_thermal_slowdown": "SwThermalSlowdown",
        "hw_thermal_slowdown": "HwThermalSlowdown", "hw_power_brake_slowdown": "HwPowerBrakeSlowdown",
        "display_clocks": "DisplayClockSetting",
    }  # fmt: skip
    theirs = {getattr(nvml, f"nvmlClocksThrottleReason{names[ours]}"): ours for ours in REASONS.values()}
    assert theirs == REASONS


def test_columns() -> None:
    assert columns([DECODING, CAPPED]) == {
        "gpu_sm_clock_MHz": 1972.5, "gpu_sm_clock_min_MHz": 1530, "gpu_power_W": pytest.approx(547.55),
        "gpu_temperature_C": 58, "gpu_throttle_reasons": "sw_power_cap",
    }  # fmt: skip
    assert columns([DECODING])["gpu_throttle_reasons"] == "none"
    assert columns([[Reading(None, None, 50, None)]]) == {"gpu_temperature_C": 50}
    assert columns([]) == columns([[]]) == {}


def test_readings_after_the_work_do_not_count_where_there_are_others() -> None:
    assert columns([[*DECODING, DONE]]) == columns([DECODING])
    assert suspicions([[*DECODING, DONE]]) == []
    assert columns([[DONE]])["gpu_sm_clock_MHz"] == 345


def test_a_power_cap_is_no_reason_for_doubt() -> None:
    assert suspicions([DECODING, CAPPED]) == []


@pytest.mark.parametrize("bit", [0x8, 0x20, 0x40, 0x80])
def test_a_slowdown_is(bit: int) -> None:
    (said,) = suspicions([DECODING, [Reading(1980, 600.0, 86, bit | 0x4)]])
    assert REASONS[bit] in said and "sw_power_cap" not in said


@pytest.mark.parametrize("bit", [0x1, 0x2, 0x4, 0x10, 0x100])
def test_other_reasons_are_not(bit: int) -> None:
    assert suspicions([[Reading(1980, 600.0, 60, bit)]]) == []


def test_heat_as_it_comes() -> None:
    (said,) = suspicions([HOT])
    assert "sw_thermal_slowdown" in said


@pytest.mark.parametrize(
    ("clocks", "mask", "suspect"),
    [((1980, 1400), 0, True), ((1980, 1400), 0x4, False), ((1000, round(1000 * (1 - MOVED))), 0, False)],
)
def test_a_clock_that_moves(clocks: tuple[int, int], mask: int, suspect: bool) -> None:
    readings = [Reading(clock, 500.0, 50, mask) for clock in clocks]
    found = suspicions([readings])
    assert bool(found) == suspect
    assert all(f"from {min(clocks)} to {max(clocks)} MHz" in said for said in found)
    # Another clock for another thing is none that moved.
    assert suspicions([[reading] for reading in readings]) == []


class Recorded:
    """What a GPU answered."""

    def __init__(self, readings: list[Reading]) -> None:
        self.readings = iter(readings)

    def read(self) -> Reading:
        return next(self.readings)


def test_a_monitor_reads_while_there_is_work_and_not_for_ever() -> None:
    monitor = Monitor(Recorded([*DECODING, *[DONE] * 20]))  # type: ignore[arg-type]
    answers = iter([False, True])
    monitor.begin_series()
    monitor.read_until(lambda: next(answers))
    monitor.begin_series()
    monitor.read_until(lambda: False)
    assert monitor.series[0] == DECODING[:2]
    assert monitor.series[1][0] == DECODING[2] and 1 < len(monitor.series[1]) < 20
