"""Timers against what is known, on a GPU: kernels of known duration, clocks as NVML sees them, the roof on disk."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fa_research.config import L2State, TimerKind
from fa_research.errors import TimingError
from fa_research.measure import self_test as self_test_module
from fa_research.measure.nvml import Gpu, find_gpu, open_monitor, reason_names
from fa_research.measure.pairs import time_pairs
from fa_research.measure.roofline import cache_folder, measure_roof, measure_roof_again
from fa_research.measure.self_test import COLD_OVER_WARM, judge, self_test
from fa_research.measure.timing import Timer
from tests.gpu.timers import KINDS, own_cache  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.quiet]

ROOT = Path(__file__).resolve().parents[2]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def timer(kind: TimerKind = TimerKind.events, l2: L2State = L2State.cold) -> Timer:
    return Timer(device(), warmup=2, max_seconds=20.0, l2=l2, kind=kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_self_test_passes_where_nothing_is_wrong(kind: TimerKind) -> None:
    self_test.cache_clear()
    start = time.perf_counter()
    columns = self_test(device(), kind)
    print({name: round(value, 4) for name, value in columns.items()}, f"{time.perf_counter() - start:.3f} s")
    assert {
        f"self_test_{kind.value}{way}" for way in ("_rate", "_graph_rate", "_noop_us", "_graph_noop_us")
    } <= set(columns)
    assert judge(columns) == () and columns["self_test_cold_over_warm"] > COLD_OVER_WARM
    start = time.perf_counter()
    self_test_module._attempt(device(), kind)
    print(f"again: {time.perf_counter() - start:.3f} s")


def test_a_timer_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Timer.time_each

    def slow_clock(self: Timer, *arguments: object, **options: object) -> object:
        timing = read(self, *arguments, **options)  # type: ignore[arg-type]
        object.__setattr__(timing, "samples_us", tuple(sample * 1.1 for sample in timing.samples_us))
        return timing

    monkeypatch.setattr(Timer, "time_each", slow_clock)
    self_test.cache_clear()
    with pytest.raises(TimingError, match=r"self_test_events_rate=1\.(09|10).*measure\.self_test=false"):
        self_test(device(), TimerKind.events)


def test_a_flush_that_flushes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timer, "flush_l2", lambda self: None)
    self_test.cache_clear()
    with pytest.raises(TimingError, match="self_test_cold_over_warm"):
        self_test(device(), TimerKind.events)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_kernels_take_the_same_time_by_every_timer(kind: TimerKind, graph: bool) -> None:
    """Three matrix products of known rate: events and CUPTI agree within a few per cent and a launch."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(3):
            torch.mm(a, a)

    by_events = timer().time(run, 20, graph=graph)
    found = timer(kind).time(run, 20, graph=graph)
    assert found.method == ("cupti" if kind is TimerKind.cupti else "cuda_graph" if graph else "cuda_events")
    assert len(found.samples_us) == 20
    assert found.median_us == pytest.approx(by_events.median_us, rel=0.1, abs=15)
    assert bool(found.spans_us) == (kind is TimerKind.cupti)
    assert all(span >= busy for span, busy in zip(found.spans_us, found.samples_us, strict=False))


def test_cupti_counts_what_ran_at_once_only_once() -> None:
    """Two streams in a graph, each as busy as the other: the sum would be twice the time."""
    from fa_research.kernels.clock import hold

    took = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()

    def run() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            hold(took[0], 200.0)
        hold(took[1], 200.0)
        torch.cuda.current_stream().wait_stream(side)

    timing = timer(TimerKind.cupti).time(run, 10, graph=True)
    assert 195 < timing.median_us < 300


def test_cupti_sees_only_kernels_where_the_host_is_slow() -> None:
    x = torch.zeros(1 << 20, device="cuda")

    def run() -> None:
        x.add_(1)
        time.sleep(0.002)
        x.add_(1)

    timing = timer(TimerKind.cupti).time(run, 5)
    assert timing.median_us < 100 and timing.spans_us[0] > 1500


def test_events_are_as_they_were_after_cupti_has_recorded() -> None:
    """The profiler may stay in the driver: a later cell of the same process is still timed by events."""
    x = torch.zeros(1 << 16, device="cuda")

    def chain() -> None:
        for _ in range(64):
            x.add_(1)

    before = timer().time(chain, 30, graph=True).median_us
    recorded = timer(TimerKind.cupti).time(chain, 10, graph=True)
    after = timer().time(chain, 30, graph=True).median_us
    print(
        f"{before:.1f} us, then {after:.1f} us; cupti: {recorded.median_us:.1f} us of {recorded.spans_us[-1]:.1f}"
    )
    assert after == pytest.approx(before, rel=0.1, abs=2)


def test_pairs_by_cupti() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    found = time_pairs(lambda: x @ x, lambda: x[:64] @ x, timer(TimerKind.cupti), pairs=10)
    assert found.low > 1 and len(found.first_us) == 10


def test_nvml_knows_this_gpu_under_visible_devices() -> None:
    """By UUID: in a process that is shown the last GPU alone, torch's device 0 is that one."""
    pytest.importorskip("pynvml")
    count = torch.cuda.device_count()
    code = (
        "import pynvml, torch\n"
        "from fa_research.measure.nvml import Gpu, find_gpu\n"
        "gpu = find_gpu(torch.device('cuda', 0))\n"
        "assert isinstance(gpu, Gpu), gpu\n"
        "uuid = pynvml.nvmlDeviceGetUUID(gpu._handle)\n"
        "assert uuid == f'GPU-{torch.cuda.get_device_properties(0).uuid}', uuid\n"
        "bus = f'{torch.cuda.get_device_properties(0).pci_bus_id:02x}'\n"
        "info = pynvml.nvmlDeviceGetPciInfo(gpu._handle)\n"
        "assert f'{info.bus:02x}' == bus, (info.bus, bus)\n"
        "print(uuid, gpu.driver(), gpu.read())\n"
    )
    visible = os.environ | {"PYTHONPATH": str(ROOT)}
    if count > 1:
        visible["CUDA_VISIBLE_DEVICES"] = str(count - 1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=visible, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


def test_readings_are_of_a_gpu_at_work() -> None:
    pytest.importorskip("pynvml")
    monitor, notes = open_monitor(device())
    assert monitor is not None and notes == []
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    watched = Timer(device(), warmup=3, max_seconds=20.0, l2=L2State.cold, monitor=monitor)
    watched.time(lambda: a @ a, 40)
    (readings,) = monitor.series
    print(*readings, sep="\n")
    assert len(readings) >= 2
    assert all(r.sm_clock_mhz and r.power_w and r.temperature_c and r.reasons is not None for r in readings)
    assert "idle" not in reason_names(readings[0].reasons or 0)


def test_reading_clocks_moves_no_median() -> None:
    """The same kernel with and without a monitor, in one process; the readings are taken after the launches."""
    pytest.importorskip("pynvml")
    x = torch.randn(1 << 22, device="cuda")
    monitor, _ = open_monitor(device())
    plain = timer().time(lambda: x.mul_(1.0), 64, graph=True).median_us
    watched = Timer(device(), warmup=2, max_seconds=20.0, l2=L2State.cold, monitor=monitor)
    seen = watched.time(lambda: x.mul_(1.0), 64, graph=True).median_us
    print(f"{plain:.2f} us, watched {seen:.2f} us")
    assert seen == pytest.approx(plain, rel=0.1, abs=1.0)
    start = time.perf_counter()
    gpu = find_gpu(device())
    assert isinstance(gpu, Gpu)
    for _ in range(20):
        gpu.read()
    print(f"a reading: {(time.perf_counter() - start) / 20 * 1e3:.2f} ms")


def test_the_roof_is_measured_once_and_read_by_the_next_process() -> None:
    first = measure_roof(device(), torch.bfloat16)
    assert not first.cached and first.bytes_per_s > 1e11
    measure_roof.cache_clear()  # as in another process
    second = measure_roof(device(), torch.bfloat16)
    assert second == dataclasses.replace(first, cached=True)
    print(first)
    assert first.read_bytes_per_s >= 0.9 * first.copy_bytes_per_s
    (place,) = cache_folder().iterdir()
    place.write_text(place.read_text()[:40])
    measure_roof.cache_clear()
    assert not measure_roof(device(), torch.bfloat16).cached
    assert not measure_roof_again(device(), torch.bfloat16).cached
    assert measure_roof(device(), torch.float32).flops_per_s < first.flops_per_s
