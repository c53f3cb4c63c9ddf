"""A sweep as one W&B run: offline runs really made, read back with W&B's own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare.wandb_sweep import mirror_sweep
from fa_research.config import TrackingConfig, TrackingMode
from fa_research.tracking import ROWS_FILE, Status, read_rows
from tests.compare.results import H200, METRIC, config_of, noisy, row_of, write_sweep
from tests.test_cli import SMALL, run_py
from tests.tracking.test_wandb_mirror import merged, records_of, runs_of

OFFLINE = TrackingConfig(mode=TrackingMode.offline)
PNG = bytes.fromhex(  # one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f00010101001bb6ee56"
    "0000000049454e44ae426082"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep over backends, contexts and batch sizes; one cell was refused."""
    cells: list[Any] = []
    for seed, (backend, context, batch) in enumerate(
        (b, c, n) for b in ("fa3", "triton") for c in (1024, 4096) for n in (1, 8)
    ):
        samples = noisy(context * batch * (1.0 if backend == "fa3" else 2.0), seed=seed)
        row = row_of(config_of(backend, context, batch), samples)
        row.wandb = {"run_id": f"run{seed}", "group": "cells"}
        cells.append((row, samples))
    lost = row_of(config_of("fa2", 1024), status=Status.unsupported, environment=H200)
    (tmp_path / "sweep").mkdir()
    return write_sweep(tmp_path / "sweep", *cells, (lost, ()))


def table_of(run_dir: Path) -> list[dict[str, Any]]:
    (path,) = run_dir.glob("files/media/table/rows_*.table.json")
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]


def exit_codes(run_dir: Path) -> list[int]:
    """What runs ended with; beside it W&B keeps how many seconds they took, where it was one or more."""
    return [record["exit_code"] for record in records_of(run_dir, "exit")]


def test_a_sweep_is_a_run_with_a_table_lines_figures_and_rows(folder: Path) -> None:
    page, figure = folder / "report.html", folder / "latency.png"
    page.write_text("<title>a report</title>")
    figure.write_bytes(PNG)
    assert mirror_sweep(folder, OFFLINE, "a study", [page, figure]) is None
    (run_dir,) = runs_of(folder)
    (about,) = records_of(run_dir, "run")
    assert (about["run_group"], about["job_type"], about["tags"]) == ("cells", "sweep", ["a study"])
    assert exit_codes(run_dir) == [0]
    summary = merged(run_dir, "summary")
    counted = {name: summary[name] for name in ("cells", "cells_ok", "cells_unsupported")}
    assert counted == {"cells": 9, "cells_ok": 8, "cells_unsupported": 1}
    (html,) = run_dir.glob("files/media/html/*.html")
    assert html.read_text() == page.read_text()
    (image,) = run_dir.glob("files/media/images/figures/latency_*.png")
    assert image.read_bytes() == PNG
    rows = read_rows(folder / ROWS_FILE)
    assert [
        (line["backend.name"], line["workload.context_len"], line["workload.batch_size"], line["status"])
        for line in table_of(run_dir)
    ] == [
        (
            row.config["backend"]["name"],
            row.config["workload"]["context_len"],
            row.config["workload"]["batch_size"],
            str(row.status),
        )
        for row in rows
    ]
    assert [line[METRIC] for line in table_of(run_dir)] == [row.metrics.get(METRIC) for row in rows]
    assert [line["run_id"] for line in table_of(run_dir)] == [*(f"run{n}" for n in range(8)), None]
    check_lines(run_dir)
    check_rows(run_dir, folder)


def check_lines(run_dir: Path) -> None:
    """A point of each backend's line at each context, a line for each batch size."""
    points = [r["item"] for r in records_of(run_dir, "history") if "axis/context_len" in r["item"]]
    assert [point["axis/context_len"] for point in points] == [1024, 4096]
    for point in points:
        for backend, factor in (("fa3", 1.0), ("triton", 2.0)):
            for batch in (1, 8):
                value = point[f"along_context_len/{METRIC}/batch_size_{batch}/{backend}"]
                assert value == pytest.approx(factor * batch * point["axis/context_len"], rel=1e-6)
    axes = {r["name"]: r.get("step_metric") for r in records_of(run_dir, "metric")}
    assert axes.pop("axis/context_len") is None
    assert set(axes.values()) == {"axis/context_len"} and len(axes) == 4


def check_rows(run_dir: Path, folder: Path) -> None:
    """The artifact of results holds rows and report, and what W&B copied lies in the sweep's folder."""
    (artifact,) = (a for a in records_of(run_dir, "artifact") if a["type"] == "results")
    assert artifact["name"] == "rows-a_study"
    assert set(artifact["aliases"]) == {"latest", "sweep"}
    copies = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert set(copies) == {ROWS_FILE, "report.html"}
    for name, copy in copies.items():
        assert folder / "wandb" in copy.parents
        assert copy.read_bytes() == (folder / name).read_bytes()
    assert "WANDB_DATA_DIR" not in os.environ


def test_a_sweep_without_new_rows_is_mirrored_once(folder: Path) -> None:
    for _ in range(2):
        mirror_sweep(folder, OFFLINE, "study")
    assert len(runs_of(folder)) == 1
    samples = noisy(5.0)
    later = row_of(config_of("jax", 1024), samples, finished="2099-01-01T00:00:00.000+00:00")
    write_sweep(folder, *[(row, ()) for row in read_rows(folder / ROWS_FILE)], (later, samples))
    mirror_sweep(folder, OFFLINE, "study")
    assert len(runs_of(folder)) == 2


def test_a_w_and_b_that_fails_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = folder / "broken.png"
    broken.write_text("no image")
    assert mirror_sweep(folder, OFFLINE, "study", [broken]) is None
    (said,) = (r.getMessage() for r in caplog.records if r.name.startswith("fa_research"))
    assert "W&B failed, the sweep is complete on disk" in said
    assert exit_codes(runs_of(folder)[0]) == [1]


def test_disabled_leaves_w_and_b_out(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from fa_research.compare.wandb_sweep import mirror_sweep\n"
        "from fa_research.config import TrackingConfig, TrackingMode\n"
        "mirror_sweep(Path(sys.argv[1]), TrackingConfig(mode=TrackingMode.disabled), 'study')\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)\n"
    )
    before = set(folder.rglob("*"))
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert set(folder.rglob("*")) == before


def test_run_py_mirrors_a_sweep_in_the_group_of_its_cells(tmp_path: Path) -> None:
    """Cells that the config's check refuses start no worker; so this is quick."""
    args = [*SMALL, "tracking=default", "tracking.mode=offline", "study=refused", "hydra.sweep.dir=a_sweep"]
    done = run_py("-m", *args, "kv.page_size=300,301", cwd=tmp_path)
    assert done.returncode == 1
    (run_dir,) = runs_of(tmp_path / "a_sweep")
    (about,) = records_of(run_dir, "run")
    assert (about["run_group"], about["tags"]) == ("a_sweep", ["refused"])
    assert [line["kv.page_size"] for line in table_of(run_dir)] == [300, 301]
    assert "wandb" not in done.stderr
