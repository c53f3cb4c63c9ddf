"""W&B as a mirror: offline runs really made and read back, and failures that cost no row."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fa_research.config import Config, TrackingConfig, TrackingMode, to_plain
from fa_research.errors import BackendUnavailable
from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status, read_rows, wandb_run
from fa_research.tracking.wandb_mirror import SERIES_FILE
from fa_research.tracking.wandb_offline import SWEEP_FILE, require_reachable, try_again, why_offline
from fa_research.tracking.wandb_runs import SETTINGS, has_key, resolve_mode, shortened

OFFLINE = Config(study="mirror_test", tracking=TrackingConfig(mode=TrackingMode.offline, tags=["tagged"]))
ROOT = Path(__file__).resolve().parents[2]


def read_back(run_dir: Path) -> dict[str, Any]:
    """What W&B's own reader finds in an offline run."""
    return json.loads(inspect(run_dir, "--summary"))


def records_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in an offline run."""
    records = map(json.loads, inspect(run_dir).splitlines())
    return [record[kind] for record in records if record["type"] == kind]


def merged(run_dir: Path, *path: str) -> dict[str, Any]:
    """What the updates of the records of a kind come to, as of a run's config or its summary."""
    kind, *inner = path
    found: dict[str, Any] = {}
    for record in records_of(run_dir, kind):
        for name in inner:
            record = record[name]
        found |= record.get("update", {})
    return found


@cache
def inspect(run_dir: Path, *flags: str) -> str:
    wandb = str(Path(sys.executable).with_name("wandb"))
    command = [wandb, "leet", "inspect", *flags, "--json", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def runs_of(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob("wandb/offline-run-*"))


def cell(
    output_dir: Path,
    config: Config = OFFLINE,
    status: Status = Status.ok,
    multirun: bool = False,
    **row: Any,
) -> Row:
    """What the runner does with one cell."""
    made = Row(status, config=to_plain(config), config_hash="0a1b2c3d", **row)
    with (
        wandb_run(
            config, resolved=made.config, output_dir=output_dir, multirun=multirun, config_hash="0a1b2c3d"
        ) as mirror,
        RowWriter(output_dir / ROWS_FILE) as writer,
    ):
        mirror.log_series("decode/step_us", "decode/step", [3.0, 4.0, 5.0, 4.0])
        mirror.log_row(made)
        writer.write(made)
    return made


def test_an_offline_run_holds_config_series_and_row(tmp_path: Path) -> None:
    cell(
        tmp_path,
        metrics={"decode_us": 3.5},
        samples={"decode_us": [3.0, 3.5, 4.0, float("nan")], "empty_us": [], "nan_us": [float("nan")]},
        checks={"max_err": 1e-3},
        generated={"prompt": "def ", "text": "main():\n\x1b"},
        notes=["a note"],
        reasons=["a reason"],
    )
    (run_dir,) = runs_of(tmp_path)
    found = read_back(run_dir)
    assert found["state"] == "finished"
    assert found["exit_code"] == 0
    assert found["config"]["kv"]["page_size"] == OFFLINE.kv.page_size
    assert found["config"]["cuda_graph"]["batch_sizes"] == OFFLINE.cuda_graph.batch_sizes
    assert found["config"]["config_hash"] == "0a1b2c3d"
    assert found["name"] == "auto-text-0a1b2c3d"
    assert found["project"] == "fa_research"
    assert set(found["tags"]) == {"mirror_test", "tagged"}
    assert found["summary"]["status"] == "ok"
    assert found["summary"]["metrics/decode_us"] == 3.5
    assert found["summary"]["checks"] == {"max_err": 1e-3}
    assert found["summary"]["generated"] == {"prompt": "def ", "text": "main():\n\x1b"}
    assert (found["summary"]["notes"], found["summary"]["reasons"]) == ("a note", "a reason")
    assert found["summary"]["decode/step"] == 3
    assert found["summary"]["decode/step_us"] == {"min": 3.0, "mean": 4.0, "max": 5.0}
    (histogram,) = (v for k, v in found["summary"].items() if k.startswith("samples/"))
    assert (histogram["_type"], sum(histogram["values"])) == ("histogram", 3)
    (row,) = read_rows(tmp_path / ROWS_FILE)
    assert row.notes == ["a note"]
    assert row.wandb == {"project": "fa_research", "group": "mirror_test", "run_id": found["run_id"]}


def test_the_row_is_an_artifact_within_the_folder_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    row = cell(tmp_path, metrics={"decode_us": 3.5}, samples={"decode_us": [3.5]})
    (run_dir,) = runs_of(tmp_path)
    (artifact,) = records_of(run_dir, "artifact")
    assert (artifact["name"], artifact["type"]) == ("row-0a1b2c3d", "row")
    (entry,) = artifact["manifest"]["contents"]
    assert run_dir in Path(entry["local_path"]).parents
    assert Row.from_json(Path(entry["local_path"]).read_text()) == row
    assert not (tmp_path / "data").exists(), "no copy elsewhere"


def test_series_are_on_disk_too(tmp_path: Path) -> None:
    cell(tmp_path)
    (series,) = map(json.loads, (tmp_path / SERIES_FILE).read_text().splitlines())
    assert series == {
        "name": "decode/step_us",
        "step_metric": "decode/step",
        "steps": [0, 1, 2, 3],
        "values": [3.0, 4.0, 5.0, 4.0],
    }


def test_cells_of_a_sweep_are_runs_of_their_own_in_one_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")  # one id for all would make one run of them
    rows = []
    for output_dir in [tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"]:
        output_dir.mkdir(parents=True)
        rows.append(cell(output_dir, multirun=True))
        assert runs_of(output_dir)[0].name.endswith(rows[-1].wandb["run_id"])
    assert len({row.wandb["run_id"] for row in rows} | {"theirs"}) == 3
    assert {row.wandb["group"] for row in rows} == {"sweep"}
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.parametrize("status", [Status.error, Status.oom, Status.inaccurate])
def test_a_failed_cell_is_a_failed_run(tmp_path: Path, status: Status) -> None:
    cell(tmp_path, status=status)
    assert read_back(runs_of(tmp_path)[0])["exit_code"] == 1


@pytest.mark.parametrize(
    ("error", "status", "exit_code"),
    [(RuntimeError("boom"), "error", 1), (BackendUnavailable("fa3", ["no GPU, boom"]), "unsupported", 0)],
)
def test_an_exception_is_mirrored_as_a_row_and_goes_on(
    tmp_path: Path, error: Exception, status: str, exit_code: int
) -> None:
    with pytest.raises(type(error), match="boom"), wandb_run(OFFLINE, resolved={}, output_dir=tmp_path):
        raise error
    found = read_back(runs_of(tmp_path)[0])
    assert found["exit_code"] == exit_code
    assert found["summary"]["status"] == status
    assert "boom" in found["summary"]["reasons"]


def test_a_w_and_b_that_cannot_start_is_a_note_in_the_row(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file where W&B wants its folder")
    row = cell(tmp_path, metrics={"decode_us": 3.5})
    assert len(row.notes) == 1
    assert "W&B could not start" in row.notes[0]
    assert "went on without W&B" in row.notes[-1]
    (written,) = read_rows(tmp_path / ROWS_FILE)
    assert written.metrics == {"decode_us": 3.5}
    assert written.notes == row.notes
    assert (tmp_path / SERIES_FILE).exists()


def test_a_w_and_b_that_dies_in_mid_run_is_a_note_in_the_row(tmp_path: Path) -> None:
    row = Row(Status.ok, metrics={"decode_us": 3.5})
    with wandb_run(OFFLINE, resolved={}, output_dir=tmp_path) as mirror:
        assert mirror._run is not None
        mirror._run.finish()  # from here on W&B refuses whatever is logged
        mirror.log_series("decode/step_us", "decode/step", [1.0])
        mirror.log_row(row)
    assert any("W&B failed" in note for note in row.notes)
    assert (tmp_path / SERIES_FILE).exists()


def test_online_without_a_network_falls_back_to_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setitem(SETTINGS, "init_timeout", 2)
    config = Config(tracking=TrackingConfig(mode=TrackingMode.auto))
    row = cell(tmp_path, config)
    assert "mode online, went on offline" in row.notes[0]
    assert read_back(runs_of(tmp_path)[-1])["summary"]["status"] == "ok"


def test_after_the_first_failure_a_sweep_is_offline_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes connections and never answers is asked by the first cell alone; a new attempt asks again."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setitem(SETTINGS, "init_timeout", 1)
        sweep = tmp_path / "sweep"
        for name in ("0", "deep/1", "2"):
            (sweep / name).mkdir(parents=True)
        (sweep / SWEEP_FILE).touch()
        rows = []
        for name in ("0", "deep/1", "2"):
            rows.append(cell(sweep / name, Config(), multirun=True))
            asked.append(_connections(server))
        assert asked[0] > 0 and asked[1:] == [0, 0]
        said = [record.message for record in caplog.records if "W&B" in record.message]
        assert len(said) == 1 and f"wandb sync {sweep}/{{,*/}}wandb/offline-run-* uploads" in said[0]
        assert {tuple(row.notes) for row in rows} == {tuple(rows[0].notes)} and "went on offline" in rows[
            0
        ].notes[0]
        assert all(runs_of(sweep / name) for name in ("0", "deep/1", "2")), "all of it can be uploaded"
        assert {row.wandb["group"] for row in rows} == {"sweep"}
        try_again(sweep)
        assert why_offline(sweep) is None


def _connections(server: socket.socket) -> int:
    """How many there were since the last call."""
    server.setblocking(False)
    kept = []
    while True:
        try:
            kept.append(server.accept()[0])
        except BlockingIOError:
            break
    for connection in kept:
        connection.close()
    return len(kept)


def test_a_server_that_cannot_be_reached_is_told_before_wandb_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached: "):
        require_reachable("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        require_reachable("http://wandb.example.org")


def test_studies_and_tags_of_any_length_reach_w_and_b(tmp_path: Path) -> None:
    """It refuses tags of more than 64 characters, and groups and projects of more than 128."""
    study = "s" * 200
    tracking = TrackingConfig(mode=TrackingMode.offline, tags=["t" * 65, "u" * 64, ""], project="p" * 129)
    row = cell(tmp_path, Config(study=study, tracking=tracking))
    found = read_back(runs_of(tmp_path)[0])
    assert row.notes == []
    assert {len(tag) for tag in found["tags"]} == {64} and "u" * 64 in found["tags"]
    assert len(found["tags"]) == 3 and len(found["project"]) == len(row.wandb["group"]) == 128
    assert found["config"]["study"] == study == row.config["study"], "the whole of it is kept"
    assert shortened("s" * 65, 64) != shortened("s" * 66, 64)


def test_disabled_imports_no_wandb_but_keeps_series(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from fa_research.config import Config, TrackingConfig, TrackingMode\n"
        "from fa_research.tracking import wandb_run, Row, Status\n"
        "config = Config(tracking=TrackingConfig(mode=TrackingMode.disabled))\n"
        "with wandb_run(config, resolved={}, output_dir=Path(sys.argv[1])) as mirror:\n"
        "    mirror.log_series('a', 'b', [1.0])\n"
        "    mirror.log_row(Row(Status.ok))\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == [SERIES_FILE]


def test_nothing_reaches_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cell(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_series_of_unequal_length_are_refused(tmp_path: Path) -> None:
    config = Config(tracking=TrackingConfig(mode=TrackingMode.disabled))
    with (
        wandb_run(config, resolved={}, output_dir=tmp_path) as mirror,
        pytest.raises(ValueError, match="2 steps for 1 values"),
    ):
        mirror.log_series("a", "b", [1.0], steps=[0, 1])


@pytest.mark.parametrize("mode", [TrackingMode.online, TrackingMode.offline, TrackingMode.disabled])
def test_a_mode_that_was_asked_for_stays(mode: TrackingMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(mode) is mode


def test_auto_is_online_only_where_a_key_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not has_key()
    assert resolve_mode(TrackingMode.auto) is TrackingMode.offline
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_mode(TrackingMode.auto) is TrackingMode.online
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(TrackingMode.auto) is TrackingMode.disabled


def test_a_key_in_netrc_counts_for_its_host_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org login user password " + "0" * 40 + "\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert has_key()
