"""A sweep that goes on makes the rows of changed code again, or keeps them where it is told to, and says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fa_research import backends, fingerprint, workloads
from fa_research.config import load_config, to_plain
from fa_research.config.store import CONFIG_DIR, register
from fa_research.sweep.stale import BEFORE, what_changed
from fa_research.tracking import ROWS_FILE, Row, Status, environment, read_rows
from tests.test_cli import SMALL, run_py

# Its file changes when it is imported, as one does that is edited while a worker runs.
PLUGIN = """
from pathlib import Path
from fa_research.backends.torch_backend import TorchBackend

Path(__file__).write_text(Path(__file__).read_text() + "# imported\\n")

class Mine(TorchBackend):
    name = "mine"

    def attend(self, call):
        out, lse = super().attend(call)
        return out * FACTOR, lse
"""


def test_rows_of_changed_code_are_made_again_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of two backends, one of them a plugin that is then broken."""
    plugin = tmp_path / "my_plugin.py"
    plugin.write_text(PLUGIN.replace("FACTOR", "1.0"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FA_RESEARCH_PLUGINS", "my_plugin")
    registries = (backends._registry, workloads._registry)
    for registry in registries:
        registry.cache_clear()
    try:
        _run_here(tmp_path / "sweep")
    finally:
        monkeypatch.delenv("FA_RESEARCH_PLUGINS")
        sys.modules.pop("my_plugin", None)
        for registry in registries:
            registry.cache_clear()
    plugin.write_text(PLUGIN.replace("FACTOR", "3.0"))
    env = {"FA_RESEARCH_PLUGINS": "my_plugin", "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    args = ["-m", *SMALL, "device=cpu", "backend.name=mine,torch", "hydra.sweep.dir=sweep"]

    kept = run_py(*args, "sweep.keep_stale=true", cwd=tmp_path, **env)
    said = "1 row was made by other code than there is now (my_plugin.py)"
    assert f"{said} and kept: sweep.keep_stale=true" in kept.stdout, kept.stdout + kept.stderr
    assert "0 of 2 cells to run" in kept.stdout and kept.returncode == 0

    again = run_py(*args, cwd=tmp_path, **env)
    assert f"{said}: its cell is run again; sweep.keep_stale=true keeps such rows" in again.stdout, (
        again.stdout
    )
    assert "1 of 2 cells to run" in again.stdout and "#1 has its row already" in again.stdout
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert [row.status for row in rows] == [Status.inaccurate, Status.ok]
    assert [row.status for row in read_rows(tmp_path / "sweep" / "0" / ROWS_FILE)] == [
        Status.ok,
        Status.inaccurate,
    ]
    assert "plugins" not in rows[1].environment["code"]
    assert what_changed(rows[0]) == ["my_plugin.py"], "the row has the digest of what the worker imported"


def _run_here(sweep: Path) -> None:
    """What the sweep's worker does, in this process."""
    from fa_research.runner import run_cell

    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        for job, name in enumerate(("mine", "torch")):
            config = load_config(compose("config", [*SMALL, "device=cpu", f"backend.name={name}"]))
            (sweep / str(job)).mkdir(parents=True)
            row = run_cell(config, resolved=to_plain(config), output_dir=sweep / str(job), multirun=True)
            assert row.status is Status.ok, row.reasons
            code = row.environment["code"]
            assert sorted(code.get("plugins", {})) == ["my_plugin"] * (name == "mine")


def test_a_row_without_a_fingerprint_is_of_unknown_code() -> None:
    assert what_changed(Row(Status.ok, environment={"gpu": None})) == [BEFORE]


@pytest.mark.parametrize(
    ("status", "packages", "said"),
    [
        (Status.ok, {}, []),
        (Status.ok, {"vllm": "0.1"}, ["vllm (0.1 before, absent now)"]),
        (Status.ok, {"torch": None}, []),
        (Status.ok, {"torch": "1.0"}, ["torch (1.0 before, NOW now)"]),
        (Status.ok, {"wandb": "0.1"}, []),
        (Status.unsupported, {"torch": None}, ["torch (absent before, NOW now)"]),
    ],
)
def test_packages_count_where_a_row_may_depend_on_them(
    status: Status, packages: dict[str, str | None], said: list[str]
) -> None:
    facts = environment([])
    now = facts["packages"]["torch"]
    changed = facts["packages"] | packages
    facts["packages"] = {name: version for name, version in changed.items() if version is not None}
    assert what_changed(Row(status, environment=facts)) == [text.replace("NOW", now) for text in said]


def test_the_fingerprint_of_a_row_is_read_back() -> None:
    row = Row(Status.ok, environment=environment([]))
    assert Row.from_json(row.to_json()).environment["code"] == fingerprint.fingerprint([])
