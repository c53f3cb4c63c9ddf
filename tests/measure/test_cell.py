"""The columns of a row: every unit's times, the parts of the attention path, memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fa_research.config import L2State, Level
from fa_research.measure import cell as cell_module
from fa_research.measure.cell import Measurement, _attention_parts, _rates, cell_timer, measure
from fa_research.measure.roofline import Roof, measure_roof
from fa_research.measure.timing import Timer
from fa_research.measure.work import attention_work
from fa_research.models import Decoder
from fa_research.workloads.text import Text
from tests.measure.test_ledger import plan_on_the_host
from tests.workloads.cells import LEVELS, cell, prepared

UNITS = {
    "decode": ["decode_step"],
    "extend": ["extend_pass"],
    "mixed": ["extend_pass"],
    "text": ["prefill", "decode_step"],
}
TIMES = ("us", "p10_us", "p90_us", "count")


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_every_unit_has_its_columns(name: str, level: Level) -> None:
    workload, engine = prepared(cell(name, level))
    ticks: list[str] = []
    options = engine.config.measure
    timer = Timer(engine.device, warmup=options.warmup, max_seconds=5.0, l2=L2State.cold)
    result = measure(engine, workload, timer, ticks.append)
    parts = ["metadata", "kv_write", "attention"] if level is Level.attention else []
    expected = {f"{unit}_{column}" for unit in UNITS[name] + parts for column in TIMES}
    kinds = {"prefill": ("computed_", "prompt_")}
    expected |= {f"{unit}_{kind}tokens_per_s" for unit in UNITS[name] for kind in kinds.get(unit, ("",))}
    expected |= {"timing_method", "timing_l2", "kv_pool_bytes", "kv_num_pages", "model_weight_bytes"}
    counted = ["attention"] if parts else [unit for unit in UNITS[name] if unit != "prefill"]
    expected |= {f"{unit}_{rate}" for unit in counted for rate in ("GB_per_s", "TFLOP_per_s")}
    expected |= {f"{part}_timing_method" for part in parts}
    assert set(result.metrics) == expected
    assert all(value > 0 for key, value in result.metrics.items() if key.endswith(("us", "_s", "count")))
    for unit in workload.units():
        assert result.metrics[f"{unit.name}_count"] == unit.samples
        assert len(result.series[f"{unit.name}_us"]) == unit.samples
        rate = unit.tokens / result.metrics[f"{unit.name}_us"] * 1e6
        kind = kinds.get(unit.name, ("",))[0]
        assert result.metrics[f"{unit.name}_{kind}tokens_per_s"] == pytest.approx(rate)
    timed = [f"timing {unit}" for unit in UNITS[name]] + ["timing the parts of attention"] * bool(parts)
    assert [said for said in ticks if said.startswith("timing")] == timed
    assert result.suspicions == []


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("host_planning", [False, True])
def test_planning_that_a_time_may_not_hold_is_told(
    on_gpu: bool, host_planning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = prepared(cell("decode"))
    if host_planning:
        plan_on_the_host(monkeypatch)
    monkeypatch.setattr(Timer, "on_gpu", on_gpu)
    _, notes = cell_timer(engine)
    assert any("plans while the GPU still runs" in note for note in notes) == (on_gpu and host_planning)


def test_memory_columns() -> None:
    workload, engine = prepared(cell("extend"))
    timer = Timer(engine.device, warmup=0, max_seconds=5.0, l2=L2State.warm)
    metrics = measure(engine, workload, timer, lambda name: None).metrics
    kv = engine.cache.kv
    assert metrics["kv_pool_bytes"] == kv.k_LNKD.nbytes + kv.v_LNKV.nbytes
    assert metrics["kv_num_pages"] == 3
    assert isinstance(engine.runner.model, Decoder)
    assert metrics["model_weight_bytes"] == engine.runner.model.weight_bytes


def test_rates_of_the_attention_path_are_its_work_by_its_time() -> None:
    workload, engine = prepared(cell("mixed", Level.attention))
    timer = Timer(engine.device, warmup=0, max_seconds=5.0, l2=L2State.warm)
    metrics = measure(engine, workload, timer, lambda name: None).metrics
    work = attention_work(workload.current_pass(), engine.specs, 4)
    seconds = metrics["attention_us"] / 1e6
    assert metrics["attention_GB_per_s"] == pytest.approx(work.bytes / seconds / 1e9)
    assert metrics["attention_TFLOP_per_s"] == pytest.approx(work.flops / seconds / 1e12)
    assert metrics["model_weight_bytes"] == 0


@pytest.mark.parametrize("name", UNITS)
def test_timing_the_parts_changes_no_key_or_value(name: str) -> None:
    """The parts are timed on the last pass's own slots: what they write is what is there already."""
    workload, engine = prepared(cell(name, Level.attention))
    for unit in workload.units():
        unit.run()
    assert engine.stack is not None
    timer = Timer(engine.device, warmup=0, max_seconds=5.0, l2=L2State.warm)
    kv = engine.cache.kv
    before = kv.k_LNKD.clone(), kv.v_LNKV.clone()
    _attention_parts(engine, engine.stack, workload, timer, result := Measurement({"timing_l2": "any"}))
    assert result.metrics["kv_write_count"] == 2
    for old, new in zip(before, (kv.k_LNKD, kv.v_LNKV), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("microseconds", "l2", "suspect"),
    [
        (2.0, "cold", False),
        (1.0, "cold", False),
        (0.9, "cold", True),
        (0.5, "cold", True),
        (0.5, "warm", False),
    ],
)
def test_what_beats_the_roof_is_suspect(
    microseconds: float, l2: str, suspect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1 MB at 1 TB/s and 1 MFLOP at 2 TFLOP/s, a microsecond is the limit; a warm L2 may well be faster."""
    monkeypatch.setattr(cell_module, "measure_roof", lambda device, dtype: Roof(0.8e12, 1e12, 2e12))
    engine = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    result = Measurement({"timing_l2": l2})
    _rates(engine, "decode_step", 1_000_000, 1_000_000, microseconds, result)  # type: ignore[arg-type]
    assert result.metrics["decode_step_roof_fraction"] == pytest.approx(1 / microseconds)
    assert (result.metrics["roof_GB_per_s"], result.metrics["roof_TFLOP_per_s"]) == (1000, 2)
    assert (result.metrics["roof_copy_GB_per_s"], result.metrics["roof_read_GB_per_s"]) == (800, 1000)
    assert bool(result.suspicions) == suspect
    if suspect:
        assert "decode_step reached" in result.suspicions[0]


@pytest.mark.gpu
def test_the_roof_is_measured_once() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    roof = measure_roof(device, torch.bfloat16)
    assert roof.bytes_per_s > 1e11 and roof.flops_per_s > 1e12
    assert measure_roof(device, torch.bfloat16) is roof


@pytest.mark.parametrize(
    ("name", "computed", "prompt"), [("text", 35 + 3 * (43 - 32), 3 * 43), ("text-unshared", 22, 22)]
)
def test_a_shared_prefix_is_computed_once(name: str, computed: int, prompt: int) -> None:
    """Two whole pages of 16 of the 35 shared tokens are shared; the passes themselves say what was computed."""
    workload, _ = prepared(cell(name))
    assert isinstance(workload, Text)
    ran: list[int] = []
    workload.prefill(lambda shared, batch, hidden: ran.append(batch.num_tokens))
    unit = workload.units()[0]
    assert (sum(ran), unit.tokens, unit.prompt_tokens) == (computed, computed, prompt)
