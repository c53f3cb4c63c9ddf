"""The ledger of captured steps and of eager passes, from what the profiler saw."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from fa_research.config import (
    BackendConfig,
    Config,
    DecodeWorkload,
    ExtendWorkload,
    GraphMode,
    L2State,
    Level,
    MeasureConfig,
)
from fa_research.engine import decode
from fa_research.engine.engine import Engine
from fa_research.measure.cell import measure
from fa_research.measure.device_trace import trace
from fa_research.measure.ledger import GAP, PARTS
from fa_research.measure.timing import Timer
from fa_research.phases import ATTENTION, HOST_PLAN, KV_WRITE, METADATA, MODEL, SAMPLING
from tests.workloads.cells import LEVELS, cell, model_config, prepared

pytestmark = [pytest.mark.gpu, pytest.mark.quiet]


def columns(metrics: dict[str, Any], unit: str) -> dict[str, float]:
    """Part -> microseconds."""
    found = {part: metrics.get(f"{unit}_ledger_{part}_us") for part in PARTS}
    return {part: value for part, value in found.items() if value is not None}


def on_gpu(workload: DecodeWorkload | ExtendWorkload, level: Level, **changes: Any) -> Config:
    """Large enough for steps of some hundred microseconds."""
    model = model_config(
        num_layers=8, hidden_size=2048, num_heads=16, num_kv_heads=4, head_dim=128, intermediate_size=4096,
        vocab_size=32000, max_context_len=8192,
    )  # fmt: skip
    backend = BackendConfig("triton", num_splits=changes.pop("num_splits", 0))
    config = cell(workload, level, device="cuda", backend="triton", poison=False, model=model)
    config.backend = backend
    config.debug.check_invariants = False
    config.measure = MeasureConfig(warmup=3, repeats=12)
    return config


DECODE = DecodeWorkload(batch_size=8, context_len=4096, steps=16)
EXTEND = ExtendWorkload(batch_size=4, new_len=4096, prefix_len=1024)  # the device lags, not the host


def measured(config: Config, l2: L2State = L2State.cold) -> tuple[dict[str, Any], Engine]:
    workload, engine = prepared(config)
    return measure(
        engine, workload, Timer(engine.device, warmup=3, max_seconds=5.0, l2=l2), lambda name: None
    ).metrics, engine


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_captured_step_adds_up(level: Level, num_splits: int) -> None:
    metrics, engine = measured(on_gpu(DECODE, level, num_splits=num_splits))
    assert engine.decode_mode is GraphMode.on
    parts = columns(metrics, "decode_step")
    assert set(parts) == set(PARTS), engine.notes
    assert 0.95 < metrics["decode_step_ledger_sum_fraction"] < 1.05, (metrics, engine.notes)
    assert (parts["combine"] > 0) == (num_splits > 1)
    busy = {METADATA, KV_WRITE, ATTENTION, GAP} | ({MODEL, SAMPLING} if level is Level.model else set())
    assert {part for part, cost in parts.items() if cost > 0} - {"combine"} == busy
    if level is Level.attention:  # the same work, timed alone without a graph's neighbours
        assert parts[ATTENTION] + parts["combine"] == pytest.approx(metrics["attention_us"], rel=0.5)


@pytest.mark.parametrize("l2", L2State, ids=str)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_an_extend_pass_adds_up(level: Level, l2: L2State) -> None:
    metrics, engine = measured(on_gpu(EXTEND, level), l2)
    parts = columns(metrics, "extend_pass")
    assert set(parts) == set(PARTS), engine.notes
    assert min(parts[part] for part in (METADATA, KV_WRITE, ATTENTION)) > 0
    assert (parts[MODEL] > 0) == (level is Level.model) and parts[SAMPLING] == 0
    fraction = metrics["extend_pass_ledger_sum_fraction"]
    said = [note for note in engine.notes if "the ledger of extend_pass adds up to" in note]
    assert bool(said) == (abs(fraction - 1) > 0.05)
    if level is Level.model:  # waits for the device and not for the host
        assert 0.95 < fraction < 1.05, (metrics, engine.notes)


def test_text_has_a_ledger_of_its_prefill_and_of_its_steps() -> None:
    metrics, engine = measured(
        cell("text", device="cuda", backend="triton", measure=MeasureConfig(repeats=4))
    )
    for unit in ("prefill", "decode_step"):
        parts = columns(metrics, unit)
        assert set(parts) == set(PARTS), engine.notes
        assert all(cost > 0 for part, cost in parts.items() if part not in (HOST_PLAN, "combine"))


def test_a_kernel_that_is_slow_shows_in_its_own_column_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte read and written in the sampling of a captured step."""
    before = columns(measured(on_gpu(DECODE, Level.model))[0], "decode_step")
    large, argmax = torch.zeros(1 << 28, device="cuda"), decode.ops.argmax

    def slow_argmax(*args: Any, **kwargs: Any) -> Any:
        large.add_(1)
        return argmax(*args, **kwargs)

    monkeypatch.setattr(decode.ops, "argmax", slow_argmax)
    metrics, engine = measured(on_gpu(DECODE, Level.model))
    after = columns(metrics, "decode_step")
    assert 0.95 < metrics["decode_step_ledger_sum_fraction"] < 1.05, (metrics, engine.notes)
    grown = {part: after[part] - before[part] for part in PARTS}
    assert grown.pop(SAMPLING) > 200  # at 10 TB/s
    assert max(map(abs, grown.values())) < 100


def test_the_profiler_is_detached_after_a_ledger() -> None:
    """While it is attached, the host needs several times as long to launch a graph. Launches before and after three
    traces are compared, and the smaller of several medians is taken: other programs only add to it."""
    x = torch.zeros(64, device="cuda")

    def chain() -> None:
        for _ in range(400):
            x.add_(1)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()

    def launch_us() -> float:
        times = []
        for _ in range(40):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            graph.replay()
            times.append((time.perf_counter_ns() - start) / 1e3)
        return median(times)

    before = min(launch_us() for _ in range(5))
    for _ in range(3):
        assert sum("spin" not in kernel.name for kernel in trace(graph.replay)) == 400
    after = min(launch_us() for _ in range(5))
    assert after < 2.5 * before, (before, after)
    x.zero_()
    graph.replay()
    assert x[0].item() == 400  # the graph that was captured before the traces is whole


def test_the_host_time_of_a_cell_is_the_same_after_a_cell_with_a_ledger() -> None:
    """Three cells in one process, the second one with a ledger."""
    host_us = []
    for ledger in (False, True, False):
        config = on_gpu(DECODE, Level.model)
        config.measure.ledger = ledger
        workload, engine = prepared(config)
        timer = Timer(engine.device, warmup=3, max_seconds=5.0, l2=L2State.warm)
        metrics = measure(engine, workload, timer, lambda name: None).metrics
        assert ("decode_step_ledger_gap_us" in metrics) == ledger
        host_us.append(metrics["decode_step_host_us"])
    assert host_us[2] < 2 * host_us[0], host_us
