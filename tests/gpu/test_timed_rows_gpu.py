"""Rows timed on a GPU: what they say of timer and clocks, and two engines measured in turns."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fa_research.config import Config, Level, TimerKind, to_plain
from fa_research.measure.nvml import Gpu, find_gpu
from fa_research.runner import run_cell
from fa_research.tracking import Row, Status
from tests.gpu.timers import KINDS, own_cache  # noqa: F401
from tests.workloads.cells import cell

pytestmark = [pytest.mark.gpu, pytest.mark.quiet]


def run(config: Config, folder: Path, against: Config | None = None) -> Row:
    folder.mkdir(parents=True)
    row = run_cell(config, resolved=to_plain(config), output_dir=folder, multirun=True, against=against)
    print(json.dumps(row.metrics, indent=1), row.reasons, row.notes)
    return row


@pytest.mark.parametrize("level", list(Level), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_says_how_it_was_timed_and_at_which_clocks(
    kind: TimerKind, level: Level, tmp_path: Path
) -> None:
    pytest.importorskip("pynvml")
    config = cell("decode", level, device="cuda", backend="triton")
    config.measure.timer, config.measure.self_test = kind, True
    row = run(config, tmp_path / "row")
    assert row.status is Status.ok, row.reasons
    metrics = row.metrics
    assert metrics["timing_method"] == ("cupti" if kind is TimerKind.cupti else "cuda_events")
    if level is Level.attention:
        methods = {metrics[f"{part}_timing_method"] for part in ("metadata", "kv_write", "attention")}
        assert methods == {"cupti" if kind is TimerKind.cupti else "cuda_graph"}
    assert ("decode_step_span_us" in metrics) == (kind is TimerKind.cupti)
    assert metrics["gpu_sm_clock_MHz"] >= metrics["gpu_sm_clock_min_MHz"] > 0
    assert metrics["gpu_power_W"] > 0 and metrics["gpu_temperature_C"] > 0
    assert isinstance(metrics["gpu_throttle_reasons"], str)
    assert abs(metrics[f"self_test_{kind.value}_rate"] - 1) < 0.03
    assert metrics["roof_from"] == "measured"
    assert set(row.samples) >= {"decode_step_us", "decode_step_host_us"}


def test_a_slowdown_makes_a_row_suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU says is recorded elsewhere: nobody heats it for a test."""
    pytest.importorskip("pynvml")
    read = Gpu.read
    monkeypatch.setattr(Gpu, "read", lambda self: dataclasses.replace(read(self), reasons=0x40))
    row = run(cell("decode", device="cuda", backend="triton"), tmp_path / "row")
    assert row.status is Status.suspect and "hw_thermal_slowdown" in row.reasons[0]
    assert row.metrics["gpu_throttle_reasons"] == "hw_thermal_slowdown"


def test_without_nvml_there_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    find_gpu.cache_clear()
    try:
        row = run(cell("decode", device="cuda", backend="triton"), tmp_path / "row")
    finally:
        find_gpu.cache_clear()
    assert row.status is Status.ok, row.reasons
    assert any("GPU clocks were not watched" in note for note in row.notes)
    assert "gpu_sm_clock_MHz" not in row.metrics


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_engines_in_turns(kind: TimerKind, tmp_path: Path) -> None:
    """An engine against its like is a tie or close to one; against plain torch it wins."""
    pairs = {"same": "triton", "torch": "torch"}
    for name, other in pairs.items():
        config, against = (
            cell("decode", Level.attention, device="cuda", backend=b) for b in ("triton", other)
        )
        for each in (config, against):
            each.measure.timer = kind
        config.measure.against = [f"backend={other}"]
        row = run(config, tmp_path / name, against)
        assert row.status is Status.ok, row.reasons
        assert row.metrics["decode_step_against_pairs"] == len(row.samples["decode_step_against_us"]) == 30
        ratio = row.metrics["decode_step_against_ratio"]
        assert 0.9 < ratio < 1.1 if name == "same" else ratio < 1


def test_two_engines_that_do_not_fit(tmp_path: Path) -> None:
    config, against = (cell("decode", device="cuda", backend="triton") for _ in range(2))
    config.measure.against = ["kv.num_pages=20000000"]
    against.kv.num_pages = 20_000_000
    against.debug.check_invariants = against.debug.poison = against.kv.churn = False
    with pytest.raises(MemoryError, match="second engine beside the first"):
        run(config, tmp_path / "row", against)
