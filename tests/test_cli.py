"""The command line as a user meets it: processes, exit codes, what is on the screen and on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fa_research.sweep import gather
from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status, read_rows

ROOT = Path(__file__).resolve().parents[1]
# The smallest run there is: nothing is measured for long, W&B stays out of it. On a GPU other tests run beside it,
# which the self-test of timing would notice.
SMALL = [
    *(
        "backend=torch",
        "model=tiny",
        "workload=decode",
        "workload.batch_size=2",
        "workload.context_len=32",
        "workload.steps=2",
    ),
    *("measure=quick", "measure.repeats=1", "measure.warmup=0", "measure.self_test=false"),
    *("tracking=disabled", "sweep.report=false"),
]


def run_py(
    *args: str, cwd: Path = ROOT, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "160"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line that a user's mistake leaves on stderr."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_help_names_every_group_and_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['run.py', '--help']\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
        "heavy = {'torch', 'triton', 'jax', 'wandb', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in (
        "backend",
        "auto, ",
        "llama3_70b",
        "first_ablation",
        "-m backend=torch,triton",
    ):
        assert part in done.stdout


def test_completion_offers_choices_and_keys() -> None:
    def complete(line: str) -> set[str]:
        return set(run_py("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).stdout.split())

    assert complete("python run.py backend=") >= {"backend=torch", "backend=fa3"}
    assert "kv.page_size=" in complete("python run.py kv.")


def test_the_composed_config_can_be_shown_without_running() -> None:
    done = run_py("--cfg", "job", "workload=decode", "kv.page_size=4")
    assert done.returncode == 0
    shown = OmegaConf.create(done.stdout)
    assert (shown.workload.name, shown.kv.page_size) == ("decode", 4)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("backend=fa9", "choose one of auto, "),
        ("kv.pagesize=1", "did you mean kv.page_size?"),
        ("+kv.pagesize=1", "did you mean kv.page_size?"),
        ("kv.page_size=x", "expected an integer"),
        ("study=..", "names a folder"),
        ("study=${nowhere}", "nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    override: str, part: str, tmp_path: Path
) -> None:
    assert part in one_error_line(run_py(override, cwd=tmp_path))


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path: Path, sweep: bool) -> None:
    # A file in the way and /proc, as permissions do not stop root.
    (tmp_path / "outputs").write_text("in the way")
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    flags = ["-m", "seed=0,1"] if sweep else []
    line = one_error_line(run_py(*flags, cwd=tmp_path))
    assert "cannot write to outputs/default/" in line.replace(f"{key}=", "")
    assert key in line
    line = one_error_line(run_py(*flags, f"{key}=/proc/nowhere", cwd=tmp_path))
    assert f"{key}=/proc/nowhere" in line


def test_a_run_leaves_row_config_log_and_hydra_files(tmp_path: Path) -> None:
    done = run_py(*SMALL, "study=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    (row,) = read_rows(folder / ROWS_FILE)
    assert row.status is Status.ok
    assert row.config_hash in folder.name
    resolved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert resolved == row.config
    assert row.config["workload"]["steps"] == 2
    assert row.environment["packages"]["torch"]
    assert (folder / "fa_research.log").exists()
    assert (folder / ".hydra" / "overrides.yaml").exists()
    assert not (folder / "wandb").exists()


def test_runs_started_together_never_share_a_folder(tmp_path: Path) -> None:
    # All of them fail at once in the config, so that they meet within one second.
    command = [sys.executable, str(ROOT / "run.py"), "+no_such_key=1"]
    children = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [child.wait() for child in children] == [2] * 4
    folders = list((tmp_path / "outputs" / "default").iterdir())
    assert len(folders) == 4
    assert all(len(read_rows(folder / ROWS_FILE)) == 1 for folder in folders)


def test_a_backend_that_cannot_run_here_is_one_line_that_names_those_that_can(tmp_path: Path) -> None:
    line = one_error_line(run_py(*SMALL, "backend=fa3", "device=cpu", cwd=tmp_path))
    assert "fa3" in line
    assert "torch" in line
    (folder,) = (tmp_path / "outputs" / "default").iterdir()
    (row,) = read_rows(folder / ROWS_FILE)
    assert row.status is Status.unsupported
    assert row.reasons


def test_a_run_without_memory_is_one_line_with_its_reason(tmp_path: Path) -> None:
    done = run_py(*SMALL, "kv.num_pages=99999999999999999", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory: ")
    assert "kv.num_pages" in line


def test_hydra_full_error_shows_the_traceback(tmp_path: Path) -> None:
    done = run_py(*SMALL, "kv.page_size=0", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "ConfigError: kv.page_size=0" in done.stderr
    assert "Traceback" in done.stderr


def test_a_sweep_has_a_row_for_every_cell_whatever_became_of_it(tmp_path: Path) -> None:
    """Runs, refused by the config, refused by the machine, not even composable: a row each, and a table at the end."""
    args = ["-m", *SMALL, "device=cpu", "backend=torch,fa3,nosuch", "kv.page_size=4,512,x"]
    done = run_py(*args, cwd=tmp_path, COLUMNS="300")
    assert done.returncode == 1, done.stderr  # some cells are errors
    (sweep,) = (tmp_path / "outputs" / "default").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    asked = [(row.config["backend"]["name"], str(row.config["kv"]["page_size"])) for row in rows]
    assert asked == [(backend, size) for backend in ("torch", "fa3", "nosuch") for size in ("4", "512", "x")]
    assert [row.status for row in rows] == [
        Status.ok,
        *[Status.error] * 2,
        Status.unsupported,
        *[Status.error] * 5,
    ]
    assert all(row.reasons for row in rows if row.status is not Status.ok)
    for job, row in enumerate(rows):
        assert read_rows(sweep / str(job) / ROWS_FILE) == [row]
    table = done.stdout[done.stdout.index("backend.name") :]
    for part in ("kv.page_size", "unsupported", "nosuch", "from 1 to 256", "9 rows in outputs/default/"):
        assert part in table
    assert "context_len" not in table.splitlines()[0]


def test_a_sweep_over_what_cells_are_timed_against(tmp_path: Path) -> None:
    """Typed as overrides are, each cell with a second engine of its own; a mistake in one is that cell's."""
    lists = "[kv.page_size=4],[kv.page_size=4,kv.churn=false],[kv.pagesize=4]"
    done = run_py("-m", *SMALL, "device=cpu", f"measure.against={lists}", cwd=tmp_path)
    (sweep,) = (tmp_path / "outputs" / "default").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    assert [row.status for row in rows] == [Status.ok, Status.ok, Status.error], done.stderr
    assert [row.metrics.get("against") for row in rows] == [
        "kv.page_size=4",
        "kv.page_size=4, kv.churn=false",
        None,
    ]
    assert all(len(row.samples["decode_step_against_us"]) == 30 for row in rows[:2])
    assert "did you mean kv.page_size?" in rows[2].reasons[0]
    line = one_error_line(run_py(*SMALL, "measure.against=[device=cuda]", cwd=tmp_path))
    assert "measure.against=['device=cuda']: device is of the run" in line


def test_a_sweep_of_cells_that_ran_or_were_refused_by_the_machine_succeeds(tmp_path: Path) -> None:
    done = run_py("-m", *SMALL, "device=cpu", "backend=torch,fa3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_sweep_in_which_nothing_can_be_composed_is_one_line(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "kv.pagesize=1,2", cwd=tmp_path))
    assert "did you mean kv.page_size?" in line


def _wait_for_row(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_bytes().endswith(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_killed_sweep_keeps_its_rows_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "seed=0,1,2", "hydra.sweep.dir=sweep"]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "sweep" / "0" / ROWS_FILE
    _wait_for_row(first)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (kept,) = read_rows(first)
    done = run_py(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweep" / ROWS_FILE)
    assert rows[0] == kept, "the finished cell was not run again"
    assert "#0 has its row already" in done.stdout
    assert [row.config["seed"] for row in rows] == [0, 1, 2]


def test_an_interrupted_sweep_says_how_it_goes_on(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *SMALL, "seed=range(40)", "hydra.sweep.dir=my sweep"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _wait_for_row(tmp_path / "my sweep" / "0" / ROWS_FILE)
    child.send_signal(signal.SIGINT)
    (line,) = child.communicate()[1].splitlines()
    assert child.returncode == 130
    assert "interrupted" in line
    assert "'hydra.sweep.dir=my sweep'" in line, "as a shell takes it"


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    child = subprocess.Popen(
        [sys.executable, "run.py", "--cfg", "job"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.communicate()[1] == b""


def test_a_cell_whose_text_nobody_reads_leaves_no_traceback_and_no_row(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [
            *(sys.executable, ROOT / "run.py", "tracking=disabled", "measure=quick", "hydra.run.dir=out"),
            *("workload.generate=300", "workload.prompt=a", "workload.batch_size=1", "workload.steps=2"),
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.read(1) == b"a"
    child.stdout.close()
    assert child.communicate()[1] == b"" and child.returncode == 1
    assert read_rows(tmp_path / "out" / ROWS_FILE) == []


def test_the_row_of_a_refused_cell_is_about_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    """And not about the default model, whose sizes the config has until the folder is read."""
    shipped = ROOT / "fa_research" / "checkpoints" / "pybyte"
    for folder, layers in ((shipped, 8), (tmp_path / "absent", None)):
        done = run_py(f"model.path={folder}", "model.mask.name=chunked", "hydra.run.dir=out", cwd=tmp_path)
        one_error_line(done)
        row = read_rows(tmp_path / "out" / ROWS_FILE)[-1]
        assert row.config["model"]["name"] == folder.name
        assert layers in (None, row.config["model"]["num_layers"])


def test_another_config_in_the_same_sweep_folder_is_run(tmp_path: Path) -> None:
    args = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    assert run_py(*args, "seed=0", cwd=tmp_path).returncode == 0
    done = run_py(*args, "seed=1", cwd=tmp_path)
    assert "has its row already" not in done.stdout
    assert [row.config["seed"] for row in read_rows(tmp_path / "sweep" / ROWS_FILE)] == [1]


def test_a_cell_that_fails_where_another_left_a_row_has_one_of_its_own(tmp_path: Path) -> None:
    """Else the sweep would show the time of the cell that ran, or why an earlier one failed."""
    args = ["-m", *SMALL, "hydra.sweep.dir=sweep"]
    assert run_py(*args, cwd=tmp_path).returncode == 0
    for refused in ("kv.num_pages=1", "kv.num_pages=2"):
        run_py(*args, refused, cwd=tmp_path)
        (row,) = read_rows(tmp_path / "sweep" / ROWS_FILE)
        assert row.status is Status.error and refused in row.reasons[0], row


def test_a_sweep_over_studies_has_one_folder(tmp_path: Path) -> None:
    done = run_py("-m", *SMALL, "study=one,two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 rows in outputs/default/" in done.stdout
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert [row.config["study"] for row in read_rows(folder / ROWS_FILE)] == ["one", "two"]


def test_a_sweep_over_presets_that_sweep_is_refused(tmp_path: Path) -> None:
    line = one_error_line(run_py("-m", "experiment=first_ablation,decode_step", cwd=tmp_path))
    assert "experiment=first_ablation is a sweep of its own, over backend, kv.page_size" in line


def test_an_experiment_that_sweeps_needs_no_flag(tmp_path: Path) -> None:
    overrides = ["experiment=first_ablation", "backend=torch", "workload.context_len=32", "workload.steps=2"]
    done = run_py(*overrides, "workload.batch_size=2", "tracking=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "first_ablation").iterdir()
    rows = read_rows(sweep / ROWS_FILE)
    assert [(row.config["backend"]["name"], row.config["kv"]["page_size"]) for row in rows] == [
        ("torch", 1),
        ("torch", 16),
    ]


def test_a_sweep_whose_output_nobody_reads_comes_to_its_end(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *SMALL, "kv.page_size=300,301", "hydra.sweep.dir=sweep"],
        cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1, "as with a reader: both cells are refused"
    assert len(read_rows(tmp_path / "sweep" / ROWS_FILE)) == 2


def test_gathering_takes_the_last_row_of_each_cell_in_job_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for job in (10, 9, 1):
        (tmp_path / str(job)).mkdir()
        with RowWriter(tmp_path / str(job) / ROWS_FILE) as writer:
            writer.write(Row(Status.error, config={"job": job}))
            writer.write(Row(Status.ok, config={"job": job}))
    (tmp_path / "5" / ".hydra").mkdir(parents=True)  # died before it could write a row
    rows = gather(tmp_path)
    assert [(row.config["job"], row.status) for row in rows] == [(job, Status.ok) for job in (1, 9, 10)]
    assert "5 has no row" in caplog.text
    lines = (tmp_path / ROWS_FILE).read_text().splitlines()
    assert [json.loads(line)["config"]["job"] for line in lines] == [1, 9, 10]
    assert gather(tmp_path) == rows, "gathering again changes nothing"
