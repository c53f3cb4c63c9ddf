"""W&B's agents over run.py: the commands that they build, and a cell that one of them starts."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from fa_research.config import Config, config_hash, load_config, to_plain
from fa_research.config.free_text import quote_free_text
from fa_research.config.store import CONFIG_DIR, register
from fa_research.tracking import ROWS_FILE, Status, read_rows
from tests.test_cli import SMALL, one_error_line, run_py
from tests.test_imports import ROOT
from tests.tracking.test_wandb_mirror import merged, records_of

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
Point = dict[str, Any]  # a parameter's name: its value
Start = Callable[[str, dict[str, Any], Point], int]


def points_of(sweep: dict[str, Any]) -> list[Point]:
    """The points of a grid."""
    values = [
        about["values"] if "values" in about else [about["value"]] for about in sweep["parameters"].values()
    ]
    return [dict(zip(sweep["parameters"], point, strict=True)) for point in product(*values)]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Has W&B's own agent start a run, with a shell's line as the `python` that it finds, and waits for its end."""
    from wandb.wandb_agent import Agent

    # what `wandb agent` sets, and what it sets for each of its runs
    known = {"WANDB_SWEEP_ID": "sweep1", "WANDB_PROJECT": "agents", "WANDB_DIR": str(tmp_path / "agent")}
    for name, value in (known | {"WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)

    def start(line: str, sweep: dict[str, Any], point: Point) -> int:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{line}\n")
        python.chmod(0o755)
        agent = Agent(api=None, queue=None, sweep_id="sweep1")
        agent._sweep_command = list(sweep["command"])
        args = {key: {"value": value} for key, value in point.items()}
        agent._command_run({"type": "run", "run_id": "run1", "program": sweep["program"], "args": args})
        return int(agent._run_processes["run1"].wait(timeout=120))

    return start


@pytest.fixture
def arguments(start: Start, tmp_path: Path) -> Callable[[dict[str, Any], Point], list[str]]:
    """What W&B's agent gives to python, read from a process that it started."""

    def of(sweep: dict[str, Any], point: Point) -> list[str]:
        record = tmp_path / "arguments"
        assert start(f"printf '%s\\0' \"$@\" > {shlex.quote(str(record))}", sweep, point) == 0
        return record.read_text().split("\0")[:-1]

    return of


def composed(overrides: list[str]) -> Config:
    """The config that run.py makes of its arguments."""
    typed = quote_free_text(overrides)
    return load_config(compose("config", typed), typed)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_cell_of_a_sweep_is_a_valid_one(
    path: Path, arguments: Callable[[dict[str, Any], Point], list[str]]
) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] == "grid", "which is what this test expands"
    hashes = set()
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        points = points_of(sweep)
        for point in points:
            program, *overrides = arguments(sweep, point)
            assert program == "run.py"
            config = composed(overrides)
            assert (config.backend.name, config.kv.page_size) == (point["backend"], point["kv.page_size"])
            hashes.add(config_hash(to_plain(config)))
    assert len(hashes) == len(points) > 1


def test_there_are_sweeps_to_check() -> None:
    assert "page_size" in {path.stem for path in SWEEPS}


def test_values_of_every_kind_arrive(arguments: Callable[[dict[str, Any], Point], list[str]]) -> None:
    sweep = yaml.safe_load(SWEEPS[0].read_text())
    point = {
        "measure.check": False,
        "cuda_graph.batch_sizes": [1, 2],
        "kv.num_pages": "null",
        "workload": "decode",
    }
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        config = composed(arguments(sweep, point)[1:])
        assert (config.measure.check, config.cuda_graph.batch_sizes, config.kv.num_pages) == (
            False,
            [1, 2],
            None,
        )
        typed = arguments(sweep, {"kv.num_pages": None})[1:]
        assert typed == ["kv.num_pages=None"], "which is why documents say to quote null"
        with pytest.raises(Exception, match="None"):
            composed(typed)


def test_a_cell_is_the_run_that_the_agent_made(start: Start, tmp_path: Path) -> None:
    """Its W&B run has the agent's id and sweep; the groups that the agent chose are columns all the same."""
    sweep = yaml.safe_load(SWEEPS[0].read_text())
    point = dict(override.split("=", 1) for override in SMALL)
    point |= {"tracking.mode": "offline", "device": "cpu", "study": "by_agent", "kv.page_size": 4}
    point["hydra.run.dir"] = str(tmp_path / "cell")
    assert start(f'exec {shlex.quote(sys.executable)} "$@"', sweep, point) == 0
    (row,) = read_rows(tmp_path / "cell" / ROWS_FILE)
    assert (row.status, row.notes and [n for n in row.notes if "W&B" in n]) == (Status.ok, [])
    assert row.wandb == {"project": "agents", "group": "sweep1", "run_id": "run1"}
    (run_dir,) = (tmp_path / "cell" / "wandb").glob("offline-run-*-run1")
    (about,) = records_of(run_dir, "run")
    assert (about["run_id"], about["sweep_id"], about["project"]) == ("run1", "sweep1", "agents")
    config = merged(run_dir, "run", "config") | merged(run_dir, "config")
    assert (config["backend"], config["backend.name"], config["kv"]["page_size"]) == ("torch", "torch", 4)
    assert merged(run_dir, "summary")["metrics/decode_step_us"] == row.metrics["decode_step_us"]


def test_an_agent_that_starts_a_sweep_is_told_to_start_a_cell(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "seed=0,1", cwd=tmp_path, WANDB_SWEEP_ID="sweep1"))
    assert "for one cell of its sweep" in line
