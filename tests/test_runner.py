"""One config in, one checked and timed row out: in this process, and as `python run.py` for what a user first types."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fa_research.config import (
    Config,
    CudaGraphConfig,
    DecodeWorkload,
    GraphMode,
    KVConfig,
    Level,
    MaskConfig,
    MeasureConfig,
    TimerKind,
    TrackingConfig,
    TrackingMode,
    config_hash,
    to_plain,
)
from fa_research.errors import ConfigError, FaResearchError, Refusal
from fa_research.runner import run_cell
from fa_research.tracking import ROWS_FILE, Row, Status, failed_row, read_rows
from fa_research.tracking.wandb_mirror import SERIES_FILE
from tests.measure.broken import DropsLastKey, FirstTableForAll, NaNInLastRow, Right, WrongScale, install
from tests.workloads.cells import LEVELS, WORKLOADS, cell, model_config

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("_us", "_count", "_per_s", "_fraction")
GPU_BACKENDS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("fa3", "triton", "auto")]


def run(config: Config, folder: Path) -> Row:
    """The cell's row; what is on disk is the same."""
    folder.mkdir(exist_ok=True)
    row = run_cell(config, resolved=to_plain(config), output_dir=folder, multirun=True)
    (written,) = read_rows(folder / ROWS_FILE)
    assert written.to_json() == row.to_json()
    return row


def times_in(row: Row) -> set[str]:
    return {name for name in row.metrics if name.endswith(TIMES)}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_every_workload_gives_a_row(name: str, level: Level, tmp_path: Path) -> None:
    config = cell(name, level)
    row = run(config, tmp_path)
    assert row.status is Status.ok and row.reasons == []
    assert row.config == to_plain(config) and row.config_hash == config_hash(config)
    what = "attention" if level is Level.attention else "logits"
    assert row.checks[f"{what}_passed"] is True
    assert 0 <= row.checks[f"{what}_max_error"] <= row.checks[f"{what}_tolerance"]
    assert times_in(row)
    wanted = {"backend": "torch", "device": "cpu", "dtype": "float32", "cuda_graph_mode": "simulate"}
    assert wanted.items() <= row.environment.items()
    assert row.environment["lowering"] == [{"kind": "native", "rewrites": []}]
    assert row.started <= row.finished
    series = [json.loads(line) for line in (tmp_path / SERIES_FILE).read_text().splitlines()]
    assert {f"series/{unit}" for unit in ("decode_step_us", "extend_pass_us", "prefill_us")} & {
        s["name"] for s in series
    }
    columns = {
        name.removesuffix("_count"): count for name, count in row.metrics.items() if name.endswith("_count")
    }
    for unit, count in columns.items():
        samples = row.samples[f"{unit}_us"]
        assert len(samples) == count and samples == [round(sample, 3) for sample in samples]
        assert median(samples) == pytest.approx(row.metrics[f"{unit}_us"], abs=1e-3)
    for entry in series:
        assert (
            len(entry["values"])
            == row.metrics[entry["name"].removeprefix("series/").replace("_us", "_count")]
        )


@pytest.mark.quiet
@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_workload_gives_a_row_on_the_gpu(backend: str, level: Level, tmp_path: Path) -> None:
    """bfloat16 and graphs; the host's share and the share of the measured roof are columns; none beats the roof."""
    for name in WORKLOADS:
        config = cell(name, level, device="cuda", backend=backend)
        try:
            row = run(config, tmp_path / name)
        except Refusal as refusal:
            pytest.skip(str(refusal))
        assert row.status is Status.ok, (name, row.reasons, row.checks)
        assert row.environment["cuda_graph_mode"] == "on" and row.environment["dtype"] == "bfloat16"
        if name == "decode":
            assert row.metrics["decode_step_host_us"] > 0
        unit = "attention" if level is Level.attention else config.workload.name + "_step"
        assert name != "decode" or 0 < row.metrics[f"{unit}_roof_fraction"] < 1.05


@pytest.mark.parametrize(
    ("mistake", "name"),
    [(DropsLastKey, "decode"), (WrongScale, "decode"), (FirstTableForAll, "mixed"), (NaNInLastRow, "extend")],
)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_wrong_cell_is_a_row_without_a_single_time(
    mistake: type[Right], name: str, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, mistake)
    row = run(cell(name, level), tmp_path)
    assert row.status is Status.inaccurate
    assert row.metrics == {} and not (tmp_path / SERIES_FILE).exists()
    (reason,) = row.reasons
    assert "float64 oracle" in reason and "max_error=" in reason
    what = "attention" if level is Level.attention else "logits"
    assert row.checks[f"{what}_passed"] is False


def test_the_same_cell_without_the_mistake_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Right)
    row = run(cell("decode"), tmp_path)
    assert row.status is Status.ok and row.environment["backend"] == "right"


def test_an_unchecked_cell_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WrongScale)
    config = cell("decode")
    config.measure.check = False
    row = run(config, tmp_path)
    assert row.status is Status.ok and row.checks == {} and times_in(row)
    assert "not checked against the oracle: measure.check=false" in row.notes


def test_what_was_chosen_is_noted(tmp_path: Path) -> None:
    config = cell("decode", backend="auto", cuda_graph=CudaGraphConfig(GraphMode.simulate, [1, 2]))
    row = run(config, tmp_path)
    notes = row.notes
    assert row.environment["cuda_graph_mode"] == "off"
    assert any(note.startswith("backend=auto chose torch") for note in notes)
    assert "ran eagerly: batch size 3 is above the largest of cuda_graph.batch_sizes (2)" in notes


@pytest.mark.parametrize("layers", [1, 2, None])
def test_the_attention_path_of_some_layers(layers: int | None, tmp_path: Path) -> None:
    config = cell(DecodeWorkload(batch_size=2, context_len=20, steps=2, num_layers=layers), Level.attention)
    row = run(config, tmp_path)
    per_layer = (row.metrics["kv_num_pages"] + 1) * 16 * 2 * 2 * 64 * 4
    assert row.metrics["kv_pool_bytes"] == per_layer * (layers or 2)


def test_rewrites_are_in_the_row(tmp_path: Path) -> None:
    """Sinks and chunks on the interpreted kernels are native, and the row says that they were interpreted."""
    model = model_config(mask=MaskConfig("chunked", 16), sink=True, num_layers=1)
    config = cell(
        DecodeWorkload(batch_size=2, context_len=20, steps=2), Level.attention, backend="triton", model=model
    )
    config.device = type(config.device).auto
    row = run(config, tmp_path)
    assert row.status is Status.ok
    assert row.environment["lowering"] == [{"kind": "native", "rewrites": []}]
    assert row.environment["triton_interpreter"] is not torch.cuda.is_available()


def test_seeds_make_a_cell_repeatable(tmp_path: Path) -> None:
    first, again = (run(cell("decode"), tmp_path / name) for name in "ab")
    other = run(cell("decode", seed=1), tmp_path / "c")
    assert first.checks == again.checks
    assert first.checks["logits_max_error"] != other.checks["logits_max_error"]
    assert first.config_hash == again.config_hash != other.config_hash


REFUSED: list[tuple[dict[str, Any], str, Status]] = [
    ({"kv": KVConfig(16, num_pages=2)}, "kv.num_pages=2 gives 2 pages", Status.error),
    ({"kv": KVConfig(16, max_requests=2)}, "kv.max_requests=2", Status.error),
    ({"backend": "nonesuch"}, "backend.name=nonesuch is unknown", Status.error),
    ({"backend": "fa3"}, "backend=fa3 is not available here", Status.unsupported),
    ({"cuda_graph": CudaGraphConfig(GraphMode.on)}, "cuda_graph.mode=on needs a CUDA device", Status.error),
    ({"measure": MeasureConfig(timer=TimerKind.cupti)}, "measure.timer=cupti: .*on cpu", Status.error),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "status"), REFUSED)
def test_what_cannot_run_raises_what_the_user_can_read(
    changes: dict[str, Any], message: str, status: Status, tmp_path: Path
) -> None:
    """No row is written: that is the caller's part, which knows whether a sweep goes on."""
    config = cell("decode", **changes)
    with pytest.raises(FaResearchError, match=message) as failure:
        run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=False)
    assert read_rows(tmp_path / ROWS_FILE) == []
    assert failed_row(failure.value).status is status


def test_a_text_that_is_missing_is_refused(tmp_path: Path) -> None:
    options = dataclasses.replace(WORKLOADS["text"], path=str(tmp_path / "nowhere"))  # type: ignore[call-arg]
    config = cell(options)
    with pytest.raises(ConfigError, match="workload.path=.*nowhere does not exist"):
        run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=False)


def test_an_offline_run_is_made_beside_the_row(tmp_path: Path) -> None:
    tracking = TrackingConfig(mode=TrackingMode.offline, progress=False)
    assert run(cell("decode", tracking=tracking), tmp_path).status is Status.ok
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb"))


# As a user types it.


def run_py(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "160"} | env
    command = [sys.executable, str(ROOT / "run.py"), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_the_defaults_do_the_main_job(tmp_path: Path) -> None:
    """`python run.py`: real text, prefill in chunks, greedy decoding, checked by a re-prefill and by float64, timed; a
    table on the screen, the row and the config on disk, an offline W&B run."""
    done = run_py("tracking.mode=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob(f"outputs/default/*/{ROWS_FILE}")
    (row,) = read_rows(path)
    assert row.status is Status.ok and row.reasons == []
    assert row.config["workload"]["name"] == "text" and row.config["model"]["name"] == "pybyte"
    assert row.config_hash in path.parent.name and len(row.config_hash) == 8
    assert row.checks["logits_passed"] is True and row.checks["reprefill_passed"] is True
    if row.environment["dtype"] == "float32":
        assert row.checks["reprefill_top1_agreement"] == 1.0
    assert row.metrics["bits_per_byte"] > 0 and row.metrics["top1_agreement"] > 0.9
    assert row.metrics["prefill_us"] > 0 and row.metrics["decode_step_us"] > 0
    assert row.metrics["decode_step_count"] == row.config["workload"]["steps"]
    assert {"packages", "python", "backend", "device"} <= set(row.environment)
    (offline,) = path.parent.glob("wandb/offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert (path.parent / "config.yaml").exists() and (path.parent / SERIES_FILE).exists()
    assert "decode_step_us" in done.stdout and "ok" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_sweep_makes_a_row_for_each_cell_and_a_table(tmp_path: Path) -> None:
    """`-m backend=torch,triton kv.page_size=1,16`, on the CPU with the interpreter, checked strictly."""
    small = ["workload=decode", "workload.batch_size=2", "workload.context_len=20", "workload.steps=2"]
    small += ["model=tiny", "model.num_layers=1", "measure=quick", "measure.repeats=1"]
    small += ["tracking=disabled", "debug=strict"]
    done = run_py("-m", "backend=torch,triton", "kv.page_size=1,16", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = [p for p in tmp_path.glob(f"outputs/default/*/{ROWS_FILE}") if "sweep" in p.parent.name]
    assert 'id="row-3"' in (path.parent / "report.html").read_text()
    rows = read_rows(path)
    cells = [(row.config["backend"]["name"], row.config["kv"]["page_size"]) for row in rows]
    assert cells == [("torch", 1), ("torch", 16), ("triton", 1), ("triton", 16)]
    assert [row.status for row in rows] == [Status.ok] * 4
    assert all(row.config["debug"]["poison"] and row.checks["logits_passed"] for row in rows)
    assert len({row.config_hash for row in rows}) == 4
    table = [line for line in done.stdout.splitlines() if "triton" in line or "torch" in line]
    assert len(table) >= 4


def test_a_checkpoint_whose_logits_pass_float16_ends_as_inaccurate(tmp_path: Path) -> None:
    """Its baseline overflows too, and an infinite tolerance would let anything pass."""
    pytest.importorskip("transformers")
    from tests.models.checkpoints import PEERS, edit_weights, save

    folder = tmp_path / "model"
    save(next(peer for peer in PEERS.values() if peer.family == "Llama"), folder, vocab_size=300)

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] *= 6e4 / weights["lm_head.weight"].abs().max()

    edit_weights(folder, enlarge)
    small = [
        f"model.path={folder}",
        "model.dtype=float16",
        "backend=torch",
        "workload=text",
        "workload.generate=0",
    ]
    small += [
        "workload.batch_size=1",
        "workload.prompt_len=20",
        "workload.shared_prefix_len=0",
        "workload.steps=2",
    ]
    done = run_py(*small, "tracking=disabled", "hydra.run.dir=out", cwd=tmp_path)
    (row,) = read_rows(tmp_path / "out" / ROWS_FILE)
    assert done.returncode == 1 and row.status is Status.inaccurate and not times_in(row)
    assert "the baseline in float16 overflows: its values pass 65,504" in row.reasons[0], row.reasons
