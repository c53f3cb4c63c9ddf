"""How often things are timed and what is made of the samples. How long anything takes is nobody's assertion."""

from __future__ import annotations

import time

import pytest
import torch

from fa_research.config import L2State
from fa_research.measure.timing import Timer, Timing
from tests.helpers import DEVICES


def timer(
    device: str = "cpu", warmup: int = 3, max_seconds: float = 60.0, l2: L2State = L2State.cold
) -> Timer:
    return Timer(torch.device(device), warmup=warmup, max_seconds=max_seconds, l2=l2)


@pytest.mark.parametrize(("warmup", "before"), [(0, 0), (1, 1), (5, 1)])
def test_each_sample_is_one_call_after_the_warmup(warmup: int, before: int) -> None:
    calls: list[int] = []
    timing = timer(warmup=warmup).time(lambda: calls.append(1), 7)
    assert len(timing.samples_us) == 7 and len(calls) == 7 + before
    assert (timing.method, timing.l2) == ("perf_counter", "any")
    assert min(timing.samples_us) > 0


def test_every_series_is_reset_before_it_starts() -> None:
    events: list[str] = []
    run, reset = (lambda: events.append("run")), (lambda: events.append("reset"))
    timer().time(run, 3, reset=reset)
    assert events == ["reset", "run", "reset", "run", "run", "run"]
    events.clear()
    timer().host_time(run, 2, reset=reset)
    assert events == ["reset", "run", "run"]


@pytest.mark.gpu
def test_every_series_is_reset_before_it_starts_on_the_gpu() -> None:
    events: list[str] = []
    run, reset = (lambda: events.append("run")), (lambda: events.append("reset"))
    timer("cuda", warmup=2).time(run, 3, reset=reset)
    assert events == ["reset", *["run"] * 2, "reset", *["run"] * 3]


@pytest.mark.parametrize("samples", [1, 2, 100])
def test_sampling_stops_when_the_time_is_up(samples: int) -> None:
    """Two samples at least, so that there is a spread."""
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = timer(warmup=0, max_seconds=1e-9).time(run, samples)
    assert len(timing.samples_us) == len(calls) == min(samples, 2)
    assert len(timer(max_seconds=1e-9).host_time(run, samples).samples_us) == min(samples, 2)
    longer = timer(warmup=0, max_seconds=0.05).time(run, 10_000)
    assert 2 < len(longer.samples_us) < 10_000


def test_host_time_counts_calls() -> None:
    calls: list[int] = []
    timing = timer().host_time(lambda: calls.append(1), 5)
    assert len(timing.samples_us) == len(calls) == 5 and timing.method == "perf_counter"


def test_metrics_are_median_deciles_and_count() -> None:
    samples = tuple(float(x) for x in range(101, 0, -1))
    assert Timing(samples, "cuda_events", "cold").metrics("step") == {
        "step_us": 51.0, "step_p10_us": 11.0, "step_p90_us": 91.0, "step_count": 101,
    }  # fmt: skip
    assert Timing((3.0,), "perf_counter", "any").metrics("a") == {
        "a_us": 3.0, "a_p10_us": 3.0, "a_p90_us": 3.0, "a_count": 1,
    }  # fmt: skip
    two = Timing((1.0, 3.0), "perf_counter", "any").metrics("a")
    assert two["a_us"] == 2.0 and 1.0 <= two["a_p10_us"] <= two["a_p90_us"] <= 3.0


@pytest.mark.gpu
@pytest.mark.parametrize("l2", list(L2State), ids=str)
@pytest.mark.parametrize("graph", [False, True])
def test_device_events(l2: L2State, graph: bool) -> None:
    calls: list[int] = []
    x = torch.zeros(1 << 20, device="cuda")

    def run() -> None:
        calls.append(1)
        x.add_(1)

    timing = timer("cuda", warmup=2, l2=l2).time(run, 40, graph=graph)
    assert len(timing.samples_us) == 40 and min(timing.samples_us) > 0
    assert timing.method == ("cuda_graph" if graph else "cuda_events") and timing.l2 == l2.value
    runs_before_capture = 1 if graph else 0
    assert float(x[0]) == 42 + runs_before_capture
    assert len(calls) == (2 if graph else 42)


@pytest.mark.parametrize("device", DEVICES)
def test_a_failing_callable_is_not_swallowed(device: str) -> None:
    def run() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        timer(device).time(run, 3)
