"""Which cells of a sweep are run: not those that have a row, that are excluded, or that come after a failed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fa_research.config import to_plain
from fa_research.config.store import CONFIG_DIR, register
from fa_research.errors import ConfigError
from fa_research.sweep import exclude, launcher
from fa_research.sweep.cells import Cell
from fa_research.sweep.view import in_short
from fa_research.tracking import ROWS_FILE, Row, Status, read_rows
from tests.test_cli import ROOT, SMALL, one_error_line, run_py

# Refused by the config's check, so that no worker starts: 0.1 s each.
REFUSED = ["-m", *SMALL, "hydra.sweep.dir=sweep", "kv.page_size=300,301,302"]


def test_a_changed_and_extended_sweep_runs_what_is_new(tmp_path: Path) -> None:
    """Rows are found by their config, in whatever cell's folder they are."""
    args = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    assert run_py(*args, "seed=0,1,2", cwd=tmp_path).returncode == 0
    before = {row.config["seed"]: row for row in read_rows(tmp_path / "sweep" / ROWS_FILE)}
    done = run_py(*args, "seed=2,0,3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert [row.config["seed"] for row in rows] == [2, 0, 3]
    assert rows[:2] == [before[2], before[0]]
    assert "1 of 3 cells to run" in done.stdout
    for job, row in enumerate(rows):
        assert read_rows(tmp_path / "sweep" / str(job) / ROWS_FILE)[-1] == row
    again = run_py(*args, "seed=2,0,3", cwd=tmp_path)
    assert "0 of 3 cells to run" in again.stdout and "3 rows in sweep" in again.stdout
    assert read_rows(tmp_path / "sweep" / ROWS_FILE) == rows


def test_fail_fast_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = run_py(*REFUSED, "sweep.fail_fast=true", cwd=tmp_path)
    assert done.returncode == 1
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert [row.config["kv"]["page_size"] for row in rows] == [300]
    assert "2 not run" in done.stdout and "hydra.sweep.dir=sweep goes on" in done.stdout
    assert "has no row" not in done.stdout
    rest = run_py(*REFUSED, cwd=tmp_path)
    assert rest.returncode == 1
    assert len(read_rows(tmp_path / "sweep" / ROWS_FILE)) == 3, "without fail_fast all of them have a row"


def test_fail_fast_stops_at_a_wrong_result_and_not_at_a_refusal(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "device=cpu", "hydra.sweep.dir=sweep", "sweep.fail_fast=true"]
    done = run_py(
        *args, "backend=torch", "backend.name=fa3,wrong,sound_a", cwd=tmp_path,
        FA_RESEARCH_PLUGINS="tests.faulty",
    )  # fmt: skip
    assert done.returncode == 1
    statuses = [row.status for row in read_rows(tmp_path / "sweep" / ROWS_FILE)]
    assert statuses == [Status.unsupported, Status.inaccurate]


def test_a_cell_that_cannot_be_composed_stops_a_sweep_that_fails_fast(tmp_path: Path) -> None:
    done = run_py("-m", *SMALL, "kv.page_size=4,x", "sweep.fail_fast=true", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 not run" in done.stdout and "1 row in" in done.stdout


def test_excluded_cells_are_not_run_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    entries = "sweep.exclude=['kv.page_size=301,seed=0','kv.page_size=303']"
    done = run_py(*REFUSED, "seed=0,1", entries, cwd=tmp_path)
    assert "sweep.exclude leaves out 1 of 6 cells" in done.stdout
    assert "sweep.exclude: 'kv.page_size=303' matches no cell" in done.stdout
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    kept = [(row.config["kv"]["page_size"], row.config["seed"]) for row in rows]
    assert kept == [(300, 0), (300, 1), (301, 1), (302, 0), (302, 1)]
    assert not (tmp_path / "sweep" / "2").exists() and (tmp_path / "sweep" / "5").exists()


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("kv.pagesize=1", "did you mean kv.page_size?"),
        ("kv.page_size", "is no list of assignments"),
        ("kv.page_size=1,2", "is no list of assignments"),
        ("seed=0", "leaves out every cell"),
    ],
)
def test_a_mistake_in_exclude_is_one_line(entry: str, part: str, tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "kv.page_size=300,301", f"sweep.exclude=['{entry}']", cwd=tmp_path))
    assert "sweep.exclude" in line and part in line


def test_quotes_that_the_shell_took_are_told(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "seed=0,1", "sweep.exclude=[backend=fa4]", cwd=tmp_path))
    assert "quote each entry, and all for the shell: \"sweep.exclude=['backend=fa4," in line


def test_cells_may_have_folders_of_other_names(tmp_path: Path) -> None:
    args = [*REFUSED, "hydra.sweep.subdir='it\\'s ${kv.page_size}'"]
    first = run_py(*args, cwd=tmp_path)
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert [row.config["kv"]["page_size"] for row in rows] == [300, 301, 302], first.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == {
        f"it's {size}" for size in (300, 301, 302)
    }
    assert "not on disk" not in first.stdout


def test_a_resumed_sweep_finds_folders_of_other_names(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=s${seed}"]
    for to_run in (2, 0):
        done = run_py(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{to_run} of 2 cells to run" in done.stdout and "2 rows in sweep" in done.stdout
    assert not (tmp_path / "sweep" / "0").exists()
    assert all(len(read_rows(tmp_path / "sweep" / name / ROWS_FILE)) == 1 for name in ("s0", "s1"))


def test_cells_do_not_share_a_folder(tmp_path: Path) -> None:
    line = one_error_line(run_py(*REFUSED, "seed=0,1", "hydra.sweep.subdir=s${seed}", cwd=tmp_path))
    assert "hydra.sweep.subdir=s${seed}: cells #0 and #2 would share the folder s0" in line


def test_batches_are_of_the_launcher_and_not_of_the_sweep(tmp_path: Path) -> None:
    """A cell that cannot be composed, or is excluded, is one of all cells, and not all of its batch."""
    args = [*REFUSED, "kv.page_size=300,x,302", "sweep.exclude=['kv.page_size=302']"]
    done = run_py(*args, "hydra.sweeper.max_batch_size=1", cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    assert "matches no cell" not in done.stdout
    sizes = [row.config["kv"]["page_size"] for row in read_rows(tmp_path / "sweep" / ROWS_FILE)]
    assert sizes == [300, "x"]
    line = one_error_line(run_py(*args, "hydra.sweeper.max_batch_size=0", cwd=tmp_path))
    assert "hydra.sweeper.max_batch_size=0: must be at least 1" in line


@pytest.fixture(scope="module")
def composed() -> list[Cell]:
    """Cells of `backend=torch,triton kv.page_size=1,16`, with another measure group in the second half."""
    register()
    cells = []
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        for job, (backend, size) in enumerate((b, s) for b in ("torch", "triton") for s in (1, 16)):
            typed = [
                f"backend={backend}",
                f"kv.page_size={size}",
                f"measure={'quick' if job > 1 else 'default'}",
                "workload=decode",
            ]
            cfg = compose("config", typed, return_hydra_config=True)
            cells.append(Cell(job, typed, to_plain(cfg), cfg, choices={**cfg.hydra.runtime.choices}))
    return cells


@pytest.mark.parametrize(
    ("entry", "jobs"),
    [
        ("backend=triton", [2, 3]),
        ("backend.name=triton,kv.page_size=1", [2]),
        ("kv.page_size=16", [1, 3]),
        ("measure=quick", [2, 3]),
        ("measure.check=true", [0, 1, 2, 3]),
        ("workload=decode, backend=torch", [0, 1]),
        ("cuda_graph.batch_sizes=[1,2,4,8,16,32,64],kv.page_size=1", [0, 2]),
        ("device=auto", [0, 1, 2, 3]),
        ("kv.num_pages=null,backend=torch", [0, 1]),
        ("backend=fa4", []),
    ],
)
def test_an_entry_leaves_out_what_has_all_its_values(
    entry: str, jobs: list[int], composed: list[Cell]
) -> None:
    (exclusion,) = exclude.parse([entry])
    assert [cell.job for cell in composed if exclusion.matches(cell)] == jobs
    assert exclude.check([exclusion], composed) == ([] if jobs else [entry])


def test_a_key_of_another_workload_is_unknown(composed: list[Cell]) -> None:
    with pytest.raises(ConfigError, match=r"workload\.new_len.*workload=extend and workload=mixed"):
        exclude.check(exclude.parse(["workload.new_len=1"]), composed)


def test_a_refused_cell_costs_next_to_nothing(tmp_path: Path) -> None:
    """No model of 70 billion parameters is built for a backend that is not there."""
    args = ["-m", "device=cpu", "backend=fa3", "model=llama3_70b", "workload=decode", "tracking=disabled"]
    done = run_py(*args, "seed=range(5)", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert [row.status for row in rows] == [Status.unsupported] * 5


def test_without_isolation_cells_run_in_the_process_of_the_sweep(tmp_path: Path) -> None:
    args = [*SMALL, "backend.name=sound_a,sound_b", "device=cpu", "sweep.isolate=false"]
    done = run_py("-m", *args, cwd=tmp_path, FA_RESEARCH_PLUGINS="tests.faulty")
    assert done.returncode == 0, done.stderr
    assert len(set(done.stderr.split("in process")[1:])) == 1, "what a cell writes goes where run.py writes"


def test_the_process_of_a_sweep_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[str(ROOT / 'run.py'), '-m', *SMALL]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 row in" in done.stdout


def test_a_cells_line_has_its_first_time_and_not_that_of_the_self_test() -> None:
    metrics = {"self_test_events_noop_us": 3.3, "step_ledger_gap_us": 1.0, "decode_step_us": 1234.0}
    assert in_short(Row(Status.ok, metrics=metrics)) == "ok decode_step_us=1,234"


def test_what_every_cell_would_fail_of_is_said_once(tmp_path: Path) -> None:
    done = run_py("-m", "workload=text", "workload.shared_prefix_len=300", "seed=0,1,2", cwd=tmp_path)
    assert "workload.shared_prefix_len=300: must be from 0 to" in one_error_line(done)
    assert not list(tmp_path.rglob("rows.jsonl"))


def test_a_check_that_breaks_before_the_sweep_leaves_the_cells_to_say_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a bug")

    overrides = OmegaConf.create({"hydra": {"overrides": {"task": []}}})
    cells = [Cell(job, [], {}, cfg=overrides) for job in (0, 1)]
    monkeypatch.setattr(launcher, "load_config", broken)
    assert launcher._of_all(cells) is None
    refusal = ConfigError("kv.page_size=0")
    assert launcher._of_all(
        [Cell(0, [], {}, error=refusal), Cell(1, [], {}, error=ConfigError("kv.page_size=0"))]
    )
    assert launcher._of_all([Cell(0, [], {}, error=refusal), *cells]) is None
