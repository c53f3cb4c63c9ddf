"""Sweeps under Hydra's other launchers, those that cannot start and those that are not there; plugins that break."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from fa_research.tracking import ROWS_FILE, Status, read_rows
from tests.test_cli import SMALL, one_error_line, run_py


def has(module: str) -> bool:
    return importlib.util.find_spec("hydra_plugins") is not None and bool(
        importlib.util.find_spec(f"hydra_plugins.{module}")
    )


LAUNCHERS = [
    pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "hydra_joblib_launcher", id="joblib"),
    pytest.param(["hydra/launcher=submitit_local"], "hydra_submitit_launcher", id="submitit"),
    pytest.param(
        ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"], "hydra_ray_launcher", id="ray"
    ),
]


@pytest.mark.parametrize(("launcher", "plugin"), LAUNCHERS)
def test_cells_are_isolated_under_every_launcher(launcher: list[str], plugin: str, tmp_path: Path) -> None:
    """A crash costs its cell; excluded cells leave no gap that others would wait at; rows tell the truth."""
    if not has(plugin):
        pytest.skip(f"{plugin} is not installed")
    args = [
        "-m",
        *SMALL,
        "device=cpu",
        "hydra.sweep.dir=sweep",
        "seed=0,1",
        "sweep.exclude=['seed=1,backend.name=crashes']",
    ]
    done = run_py(
        *args, "backend.name=crashes,sound_a", *launcher, "hydra.sweeper.max_batch_size=2", cwd=tmp_path, timeout=250,
        FA_RESEARCH_PLUGINS="tests.faulty",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    said = [(row.config["seed"], row.config["backend"]["name"], row.status) for row in rows]
    assert sorted(said, key=str) == sorted(
        [(0, "crashes", Status.error), (0, "sound_a", Status.ok), (1, "sound_a", Status.ok)], key=str
    )
    assert "SIGSEGV" in next(row for row in rows if row.status is Status.error).reasons[0]
    assert done.stdout.count("of 3, ") == 3, "a line for each cell that has its row"
    again = run_py(*args, "backend.name=sound_a", *launcher, cwd=tmp_path, FA_RESEARCH_PLUGINS="tests.faulty")
    assert again.returncode == 0 and "0 of 2 cells to run" in again.stdout, again.stdout


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "n_jobs == 0"),
        (["hydra/launcher=submitit_local", "hydra.launcher.nodes=3"], "only one node"),
        (["hydra/launcher=submitit_slurm"], "srun"),
    ],
)
def test_a_launcher_that_cannot_start_is_one_line(launcher: list[str], reason: str, tmp_path: Path) -> None:
    name = launcher[0].removeprefix("hydra/launcher=")
    if not has(f"hydra_{name.split('_')[0]}_launcher") or shutil.which(reason):
        pytest.skip("it is not installed, or there is a queue")
    done = run_py("-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep", *launcher, cwd=tmp_path)
    line = one_error_line(done)
    assert line.startswith(f"error: hydra/launcher={name}: it ran no cell: ") and reason in line
    assert "hydra/launcher=basic" in line
    assert not list((tmp_path / "sweep").rglob(ROWS_FILE))


def test_cells_of_a_launcher_that_breaks_off_have_their_rows(tmp_path: Path) -> None:
    """Those that had not begun too."""
    if not has("hydra_joblib_launcher"):
        pytest.skip("hydra_joblib_launcher is not installed")
    args = [*SMALL, "device=cpu", "seed=range(4)", "backend.name=kills_itself", "sweep.isolate=false"]
    done = run_py(
        "-m", *args, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep", cwd=tmp_path,
        FA_RESEARCH_PLUGINS="tests.faulty",
    )  # fmt: skip
    assert done.returncode == 1 and "not on disk" not in done.stdout
    for job in "0123":
        (row,) = read_rows(tmp_path / "sweep" / job / ROWS_FILE)
        assert "the launcher lost it" in row.reasons[0]


@pytest.mark.parametrize("name", ["joblib", "submitit_slurm", "ray"])
def test_a_launcher_that_is_not_installed_names_the_extra(name: str, tmp_path: Path) -> None:
    if has(f"hydra_{name.split('_')[0]}_launcher"):
        pytest.skip("it is installed")
    line = one_error_line(run_py("-m", "seed=0,1", f"hydra/launcher={name}", cwd=tmp_path))
    assert "pip install -e '.[" in line


def test_an_unknown_launcher_lists_those_there_are(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "seed=0,1", "hydra/launcher=slurm", cwd=tmp_path))
    assert "choose one of basic" in line


@pytest.mark.parametrize("flags", [[], ["-m", "seed=0,1"], ["-m", "seed=0,1", "hydra/launcher=joblib"]])
@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        ("no.such", "ModuleNotFoundError: No module named 'no'"),
        ("half", "SyntaxError: "),
        ("dies", "ZeroDivisionError: a plugin may"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    plugin: str, reason: str, flags: list[str], tmp_path: Path
) -> None:
    if "hydra/launcher=joblib" in flags and not has("hydra_joblib_launcher"):
        pytest.skip("hydra_joblib_launcher is not installed")
    (tmp_path / "half.py").write_text("def half(")
    (tmp_path / "dies.py").write_text("print('so far')\nraise ZeroDivisionError('a plugin\\nmay')")
    env = {"FA_RESEARCH_PLUGINS": plugin, "PYTHONPATH": str(tmp_path)}
    done = run_py(*SMALL, *flags, "hydra.sweep.dir=sweep", cwd=tmp_path, **env)
    line = one_error_line(done)
    assert f"FA_RESEARCH_PLUGINS={plugin}: cannot be imported: {reason}" in line and "PYTHONPATH" in line
    assert not list((tmp_path / "sweep").glob("*/rows.jsonl")), "no cell was run"


def test_a_plugin_that_ends_its_process_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)")
    env = {"FA_RESEARCH_PLUGINS": "ends", "PYTHONPATH": str(tmp_path)}
    line = one_error_line(run_py("-m", *SMALL, cwd=tmp_path, **env))
    assert "FA_RESEARCH_PLUGINS=ends: cannot be imported: it ended its process" in line
