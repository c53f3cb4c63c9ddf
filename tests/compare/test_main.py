"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
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
    assert "not the drift from one run to the next" in text


def test_a_users_mistake_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(sweep(tmp_path, TIMES), "-q", "bakend")
    assert code == 2
    assert capsys.readouterr().err == "error: no row has a key bakend; did you mean backend?\n"


def test_the_published_studies_can_be_asked() -> None:
    code, text = run(ROOT / "experiments" / "decode_step", "-q", "page_size", "--regret")
    assert code == 0
    assert "always kv.page_size=" in text
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


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, _ = run(sweep(tmp_path / "in", TIMES), "-q", "backend", "--out", tmp_path / "file" / "out")
    assert code == 2
    assert f"{tmp_path}/file/out: Not a directory" in capsys.readouterr().err
