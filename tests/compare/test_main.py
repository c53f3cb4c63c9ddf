"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fa_research.compare.__main__ import main
from fa_research.tracking import CONSOLE
from tests.compare.results import sweep

ROOT = Path(__file__).resolve().parents[2]
TIMES = {("fa3", 1024): 100.0, ("triton", 1024): 112.0, ("fa3", 4096): 200.0, ("triton", 4096): 200.2}


def run(*arguments: object) -> tuple[int, str]:
    with CONSOLE.capture() as capture:
        code = main([str(argument) for argument in arguments])
    return code, capture.get()


def test_it_shows_numbers_verdicts_and_what_they_rest_on(tmp_path: Path) -> None:
    code, text = run(sweep(tmp_path, TIMES), "--question", "backend", "--regret")
    assert code == 0
    assert re.search(r"1024\s+100\s+112\s+fa3; triton 12 % \[\d+\.\d, \d+\.\d\] slower", text)
    assert "tie: fa3 = triton" in text
    assert "backend=fa3: best in 1 of 2 cells, tied for it in 1" in text
    assert "always backend=fa3: 0.0 % worse" in text
    assert "which wins" in text
    assert (
        "two numbers closer than the drift between runs (3.0 %) are not ranked: use measure.against" in text
    )
    assert "regret of one choice everywhere, over 2 cells" in text
    assert not [line for line in text.splitlines() if line.endswith(" ")], "in a pipe no line is filled up"


def test_a_users_mistake_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(sweep(tmp_path, TIMES), "-q", "bakend")
    assert code == 2
    assert capsys.readouterr().err == "error: no row has a key bakend; did you mean backend?\n"


def test_the_published_studies_can_be_asked() -> None:
    code, text = run(ROOT / "experiments" / "decode_step" / "results", "-q", "page_size", "--regret")
    assert code == 0
    assert "kv.page_size=64: best in 0 of 6 cells, tied for it in 6" in text
    code, text = run(ROOT / "experiments" / "attention_kernels", "-q", "variant")
    assert code == 0
    assert "variant=triton: best in" in text


def test_csv_has_every_number_with_its_row(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "in", TIMES)
    code, _ = run(folder, "-q", "backend", "--out", tmp_path / "out")
    assert code == 0
    with (tmp_path / "out" / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {
        (line["backend"], int(line["workload.context_len"])): float(line["decode_step_us"]) for line in lines
    }
    assert found == pytest.approx(TIMES)
    for line in lines:
        path, _, number = line["row"].rpartition(":")
        assert line["config_hash"] in Path(path).read_text().splitlines()[int(number) - 1]
    with (tmp_path / "out" / "regret.csv").open() as file:
        assert {line["backend"] for line in csv.DictReader(file)} == {"fa3", "triton"}


def test_every_link_of_the_markdown_leads_to_a_row(tmp_path: Path) -> None:
    run(sweep(tmp_path / "in", TIMES), "-q", "backend", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    links = set(re.findall(r"\]\(#(row-\d+)\)", text))
    assert len(links) == 4
    assert links <= set(re.findall(r'<a id="(row-\d+)">', text))


def test_it_runs_as_a_module_and_helps() -> None:
    command = [sys.executable, "-m", "fa_research.compare", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--question" in done.stdout


def test_a_reader_that_is_gone_is_no_error(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m fa_research.compare {sweep(tmp_path, TIMES)} -q backend | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("more", [["-q", "backend"], ["--closure"]])
def test_a_folder_of_results_is_never_written_to(
    tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(tmp_path, TIMES)
    (folder / "report.html").write_text("the sweep's own")
    for own in (folder, folder / "0"):
        code, text = run(folder, *more, "--out", own)
        assert (code, text) == (2, "")
        assert f"error: --out {own} holds results (rows.jsonl)" in capsys.readouterr().err
    assert (folder / "report.html").read_text() == "the sweep's own"
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2", "3", "report.html", "rows.jsonl"]


def test_a_file_is_no_folder_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").touch()
    assert run(sweep(tmp_path / "in", TIMES), "-q", "backend", "--out", tmp_path / "README.md") == (2, "")
    assert capsys.readouterr().err == f"error: --out {tmp_path}/README.md is a file: give a folder\n"


def test_files_are_there_though_the_screen_cannot_be_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fa_research.compare", sweep(tmp_path / "in", TIMES), "-q", "backend"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "--out", tmp_path / "out"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert re.fullmatch(r"cannot write to stdout: No space left on device; .*\n", done.stderr)
    assert (tmp_path / "out" / "report.md").exists()


def test_notes_follow_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path, TIMES)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"status": "ok", "conf')
    assert run(folder, "-q", "bakend")[0] == 2
    error, note = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no row has a key bakend")
    assert note.startswith(f"note: {folder}/rows.jsonl:5 is not a row and was skipped")


@pytest.mark.parametrize("given", ["abc", "nan", "-1", "100"])
def test_a_tie_that_is_no_percentage_is_said_so(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["somewhere", "-q", "backend", f"--tie={given}"])
    assert f"argument --tie: {given} is not a percentage from 0 to 100" in capsys.readouterr().err


def test_what_takes_long_to_import_is_imported_where_ctrl_c_is_answered() -> None:
    code = (
        "import sys, fa_research.compare.__main__; print({'numpy', 'omegaconf', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_ctrl_c_ends_it_with_a_word(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")  # reading waits for a writer that never comes
    command = [sys.executable, "-m", "fa_research.compare", tmp_path, "-q", "backend"]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    writer = None
    while writer is None and child.poll() is None:
        try:
            writer = os.open(tmp_path / "rows.jsonl", os.O_WRONLY | os.O_NONBLOCK)  # works once it is read
        except OSError:
            time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert writer is not None
    os.close(writer)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, _ = run(sweep(tmp_path / "in", TIMES), "-q", "backend", "--out", tmp_path / "file" / "out")
    assert code == 2
    assert f"--out {tmp_path}/file/out: Not a directory" in capsys.readouterr().err
