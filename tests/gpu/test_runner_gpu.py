"""Rows that only a GPU makes: of cells that run out of its memory, or seem faster than it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fa_research.config import DecodeWorkload, KVConfig, to_plain
from fa_research.errors import DoesNotFit
from fa_research.measure import cell as cell_module
from fa_research.measure.roofline import Roof
from fa_research.models import attention_specs
from fa_research.runner import run_cell
from fa_research.tracking import ROWS_FILE, Status, failed_row, read_rows
from tests.test_runner import run, run_py, times_in
from tests.workloads.cells import cell, model_config

pytestmark = pytest.mark.gpu


def test_a_cell_that_beats_the_roof_is_suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module, "measure_roof", lambda device, dtype: Roof(1.0, 1.0, 1.0))
    row = run(cell("decode", device="cuda", backend="triton"), tmp_path)
    assert row.status is Status.suspect and times_in(row)
    assert "which cannot be" in row.reasons[0]


def test_memory_that_ran_out_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An enormous batch: the pool alone is larger than any GPU. It is refused before anything is built. What passes
    that check and does not fit all the same is told apart too. Afterwards a small cell runs."""
    options = DecodeWorkload(batch_size=60_000, context_len=4000, steps=1)
    config = cell(options, device="cuda", backend="triton", model=model_config(max_context_len=4096))
    config.kv = KVConfig(256, churn=False)
    config.debug.check_invariants = False
    assert len(attention_specs(config.model)) == 2
    (tmp_path / "refused").mkdir()
    with pytest.raises(DoesNotFit) as refused:
        run_cell(config, resolved=to_plain(config), output_dir=tmp_path / "refused", multirun=True)
    assert failed_row(refused.value).status is Status.oom
    monkeypatch.setattr("fa_research.runner.check_fits", lambda *args: None)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=True)
    assert failed_row(failure.value).status is Status.oom
    del failure
    assert run(cell("decode", device="cuda", backend="triton"), tmp_path / "small").status is Status.ok


def test_a_sweep_goes_on_after_a_cell_that_ran_out_of_memory(tmp_path: Path) -> None:
    small = ["workload=decode", "workload.batch_size=2", "workload.context_len=20", "workload.steps=2"]
    small += ["backend=triton", "measure=quick", "measure.self_test=false", "tracking=disabled"]
    small += ["kv.page_size=256", "kv.churn=false"]
    done = run_py("-m", "kv.num_pages=2000000,null", *small, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = [p for p in tmp_path.glob(f"outputs/default/*/{ROWS_FILE}") if "sweep" in p.parent.name]
    assert [row.status for row in read_rows(path)] == [Status.oom, Status.ok]
