"""The command line as a user meets it: processes, exit codes, what is on the screen and on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fa_research.tracking import ROWS_FILE, Status, read_rows

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
    assert shown.model.num_layers == 8 and "# sampling.seed=null: 0" in done.stdout, "what the run uses"
    assert run_py("--cfg", "job", "-p", "kv.page_size").stdout == "16\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["kv.page_size=4", "--cfg", "job", "workload=decode"],
        ["kv.page_size=4", "workload=decode", "--cfg=job"],
        ["~experiment", "--cfg", "job", "++kv.page_size=4", "workload=decode"],
        ["workload=decode", "--config-dir", "a=b/c=d", "--cfg", "job", "kv.page_size=4"],
    ],
)
def test_flags_may_stand_among_overrides(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "a=b" / "c=d").mkdir(parents=True)
    done = run_py(*(text.replace("a=b/", f"{tmp_path}/a=b/") for text in arguments), cwd=tmp_path)
    shown = OmegaConf.create(done.stdout)
    assert (shown.workload.name, shown.kv.page_size) == ("decode", 4), done.stderr


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


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    child = subprocess.Popen(
        [sys.executable, "run.py", "--cfg", "job"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.communicate()[1] == b""


def test_a_cell_whose_text_nobody_reads_has_its_row(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [
            *(sys.executable, ROOT / "run.py", "tracking=disabled", "measure=quick", "hydra.run.dir=out"),
            *("workload.generate=30", "workload.prompt=a", "workload.batch_size=1", "workload.steps=2"),
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    while child.stdout.readline() != b"loading pybyte\n":  # the text follows
        pass
    child.stdout.close()
    assert child.communicate()[1].startswith(b"nobody reads stdout any more") and child.returncode == 0
    (row,) = read_rows(tmp_path / "out" / ROWS_FILE)
    assert row.status is Status.ok and row.generated["text"]


def test_the_row_of_a_refused_cell_is_about_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    """And not about the default model, whose sizes the config has until the folder is read."""
    shipped = ROOT / "fa_research" / "checkpoints" / "pybyte"
    for folder, layers in ((shipped, 8), (tmp_path / "absent", None)):
        done = run_py(f"model.path={folder}", "model.mask.name=chunked", "hydra.run.dir=out", cwd=tmp_path)
        one_error_line(done)
        row = read_rows(tmp_path / "out" / ROWS_FILE)[-1]
        assert row.config["model"]["name"] == folder.name
        assert layers in (None, row.config["model"]["num_layers"])
