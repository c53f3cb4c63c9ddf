"""The step-cost ledger: a cost shows in its own column and in no other, and columns add up or the row says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fa_research.backends.torch_backend import TorchBackend
from fa_research.config import (
    GraphMode,
    L2State,
    Level,
)
from fa_research.engine.engine import Engine
from fa_research.engine.token_reader import TokenReader
from fa_research.measure import ledger as ledger_module
from fa_research.measure.cell import measure
from fa_research.measure.ledger import GAP, PARTS, clocked, ledger
from fa_research.measure.timing import Timer
from fa_research.phases import ATTENTION, HOST_PLAN, KV_WRITE, METADATA, MODEL, SAMPLING
from fa_research.workloads import Workload
from fa_research.workloads.base import Unit
from tests.workloads.cells import LEVELS, cell, prepared

UNITS = {
    "decode": ["decode_step"],
    "extend": ["extend_pass"],
    "mixed": ["extend_pass"],
    "text": ["prefill", "decode_step"],
}
ON_CPU = [part for part in PARTS if part != "combine"]


def timer_of(engine: Engine, l2: L2State = L2State.cold) -> Timer:
    return Timer(engine.device, warmup=1, max_seconds=5.0, l2=l2)


def columns(metrics: dict[str, Any], unit: str) -> dict[str, float]:
    """Part -> microseconds."""
    found = {part: metrics.get(f"{unit}_ledger_{part}_us") for part in PARTS}
    return {part: value for part, value in found.items() if value is not None}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_every_unit_has_a_ledger(name: str, level: Level) -> None:
    workload, engine = prepared(cell(name, level))
    without = measure(engine, workload, timer_of(engine), lambda name: None).metrics
    assert not any("ledger" in metric for metric in without)
    engine.config.measure.ledger = True
    metrics = measure(engine, workload, timer_of(engine), lambda name: None).metrics
    new = {f"{unit}_ledger_{part}_us" for unit in UNITS[name] for part in ON_CPU}
    assert set(metrics) == set(without) | new | {f"{unit}_ledger_sum_fraction" for unit in UNITS[name]}
    for unit in UNITS[name]:
        parts = columns(metrics, unit)
        samples = level is Level.model and unit != "extend_pass"
        zero = {part for part, cost in parts.items() if cost == 0}
        assert zero == {HOST_PLAN} | (set() if samples else {SAMPLING})
        assert min(parts.values()) >= 0
        fraction = metrics[f"{unit}_ledger_sum_fraction"]
        assert fraction == pytest.approx(sum(parts.values()) / metrics[f"{unit}_us"])
        said = any(f"the ledger of {unit} adds up to" in note for note in engine.notes)
        assert said == (abs(fraction - 1) > 0.5)


@pytest.mark.parametrize("mode", [GraphMode.simulate, GraphMode.off], ids=str)
def test_the_ledger_leaves_the_context_as_it_was(mode: GraphMode) -> None:
    config = cell("decode")
    config.cuda_graph.mode = mode
    workload, engine = prepared(config)
    lens = [request.seq_len for request in workload.requests]  # type: ignore[attr-defined]
    [unit] = workload.units()
    ledger(engine, unit, timer_of(engine), 1.0)
    assert workload.current_pass().seq_lens == lens


SLEEP_US = 50_000


def slowed(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLEEP_US / 1e6)
        return method(*args, **kwargs)

    return run


def slow(phase: str, workload: Workload, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Unit:
    """The workload's unit with one phase slowed."""
    [unit] = workload.units()
    places: dict[str, tuple[object, str]] = {
        METADATA: (engine.backend, "plan"),
        HOST_PLAN: (engine.backend, "plan"),
        KV_WRITE: (engine.cache.kv, "rope_and_write"),
        ATTENTION: (engine.backend, "attend"),
        MODEL: (engine.runner.model, "compute_logits"),
        SAMPLING: (TokenReader, "push"),
    }
    if phase == GAP:
        return replace(unit, run=slowed(unit.run))
    place, name = places[phase]
    monkeypatch.setattr(place, name, slowed(getattr(place, name)))
    return unit


def plan_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    fget = TorchBackend.capabilities.fget  # type: ignore[attr-defined]
    planning = property(lambda self: replace(fget(self), host_planning=True))
    monkeypatch.setattr(TorchBackend, "capabilities", planning)


@pytest.mark.parametrize("phase", ON_CPU)
def test_what_is_slow_shows_in_its_own_column_alone(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if phase == HOST_PLAN:
        plan_on_the_host(monkeypatch)
    workload, engine = prepared(cell("decode"))
    costs = clocked(slow(phase, workload, engine, monkeypatch), 3)
    assert (spent := costs.pop(phase)) >= SLEEP_US
    assert max(costs.values()) < spent


def test_extend_passes_tell_their_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, engine = prepared(cell("extend"))
    costs = clocked(slow(ATTENTION, workload, engine, monkeypatch), 2)
    assert (spent := costs.pop(ATTENTION)) >= 2 * SLEEP_US  # two layers
    assert max(costs.values()) < spent


@pytest.mark.parametrize(("wrong", "said"), [(2.5, "0.40"), (0.5, "2.00"), (0.7, None), (1.0, None)])
def test_columns_that_do_not_add_up_are_said_to(
    wrong: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs against other timed medians; on a GPU it takes less, as tests/measure/test_ledger_gpu.py says."""
    workload, engine = prepared(cell("decode"))
    [unit] = workload.units()
    costs = clocked(unit, 3)
    monkeypatch.setattr(ledger_module, "clocked", lambda unit, count: costs)
    found = ledger(engine, unit, timer_of(engine), wrong * sum(costs.values()))
    assert found["decode_step_ledger_sum_fraction"] == pytest.approx(1 / wrong)
    assert [f"the ledger of decode_step adds up to {said} of" in note for note in engine.notes] == [
        True
    ] * bool(said)
