"""The report at a sweep's end: it finds what was swept, draws what there is, and stands when little is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare.overview import read_sweep
from fa_research.compare.sweep_report import write
from fa_research.sweep import ending
from fa_research.tracking import CONSOLE, ROWS_FILE, Row, Status
from tests.compare.pages import Page
from tests.compare.results import H200, METRIC, config_of, noisy, row_of, sweep, write_rows, write_sweep

ROOT = Path(__file__).resolve().parents[2]
TIMES = {
    (backend, context): base * context / 1024
    for backend, base in (("fa3", 100.0), ("triton", 112.0))
    for context in (1024, 4096, 16384)
}
ROOF = {"roof_GB_per_s": 4000.0, "roof_TFLOP_per_s": 800.0}


def full_row(backend: str, context: int, page: int, seed: int) -> tuple[Row, list[float]]:
    """A row with every column that a figure is drawn from."""
    time = TIMES[backend, context] * (1 + 0.1 / page)
    samples = noisy(time, seed=seed)
    ledger = {"metadata": 2.0, "attention": 0.7 * time, "model": 0.25 * time, "gap": 0.05 * time - 2.0}
    row = row_of(
        config_of(backend, context, page=page),
        samples,
        environment=H200 | {"cuda_graph_mode": "on"},
        decode_step_GB_per_s=2000.0 + page,
        decode_step_TFLOP_per_s=4.0,
        decode_step_ledger_sum_fraction=1.0,
        **{f"decode_step_ledger_{part}_us": cost for part, cost in ledger.items()},
        **ROOF,
    )
    row.checks = {"logits_max_error": 0.2, "logits_tolerance": 0.8, "logits_passed": True}
    return row, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells: list[tuple[Row, Any]] = [
        full_row(backend, context, page, seed)
        for seed, (backend, context, page) in enumerate((b, c, p) for b, c in TIMES for p in (1, 16))
    ]
    lost = row_of(config_of("fa2", 1024), status=Status.unsupported, environment=H200)
    lost.reasons = ["<b>no</b> Ampere kernels here"]
    doubtful, samples = full_row("fa3", 1024, 1, 99)
    doubtful.config["kv"]["page_size"] = 64
    doubtful.config_hash, doubtful.status, doubtful.reasons = "12345678", Status.suspect, ["clocks throttled"]
    made = tmp_path_factory.mktemp("sweep")
    return write_sweep(made, *cells, (lost, ()), (doubtful, samples))


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    pytest.importorskip("altair", reason="needs the extra report")
    pytest.importorskip("vl_convert", reason="needs the extra report")
    return write(folder)


@pytest.fixture(scope="module")
def text(files: list[Path]) -> str:
    return files[0].read_text()


def test_what_was_swept_is_found(folder: Path) -> None:
    found = read_sweep(folder)
    assert found.keys == ["backend.name", "kv.page_size", "workload.context_len"]
    (part,) = found.parts
    assert part.metric == METRIC
    assert [comparison.question.title for comparison in part.asked] == ["backend", "kv.page_size"]
    assert part.lines is not None
    assert (
        len(part.lines.cells) == 7
    )  # two page sizes at three contexts, and the suspect one that stands alone
    assert [int(record.path.parent.name) for record in found.records] == list(range(14))


def test_everything_that_rows_have_is_drawn(files: list[Path]) -> None:
    assert [path.name for path in files] == [
        "report.html",
        "latency.png",
        "roofline_decode_step.png",
        "ledger_decode_step.png",
        "page_size.png",
        "decision_backend.png",
        "regret_backend.png",
        "decision_page_size.png",
        "regret_page_size.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])


def test_it_is_one_file_whose_links_all_lead_somewhere(text: str) -> None:
    found = Page(text)
    assert found.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert not re.findall(r"https?://|@import|url\((?!#)", text)
    assert len(found.ids) == len(set(found.ids))
    assert {link for link in found.links if not link.startswith("#")} == set()
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert {f"row-{number}" for number in range(14)} <= set(found.ids)
    assert "prefers-color-scheme: dark" in text
    assert len(text.encode()) < 2_000_000


def test_each_row_is_there_in_full_with_its_place(text: str, folder: Path) -> None:
    for number in range(14):
        section = re.search(rf'<section class="row" id="row-{number}">.*?</section>', text, re.S)
        assert section is not None
        assert f"{folder}/{number}/{ROWS_FILE}:1" in section[0]
    first = re.search(r'<section class="row" id="row-0">.*?</section>', text, re.S)
    assert first is not None
    for line in ("decode_step_ledger_metadata_us: 2.0", "logits_passed: True", "backend.name: fa3"):
        assert line in first[0]


def test_every_number_of_the_overview_leads_to_its_row(text: str) -> None:
    table = text[text.index('id="overview"') :]
    lines = re.findall(r"<tr><td>(.*?)</tr>", table[: table.index("</table>")])
    assert len(lines) == 14
    for number, line in enumerate(lines):
        assert set(re.findall(r'href="#(.*?)"', line)) == {f"row-{number}"}
    assert "logits 25 %" in lines[0]
    assert re.search(r'110</a> <span class="small">\[1\d\d(\.\d)?, 1\d\d(\.\d)?\]', lines[0])


def test_rows_that_are_not_ok_are_listed_with_their_reasons(text: str) -> None:
    table = text[text.index('id="doubtful"') :]
    table = table[: table.index("</table>")]
    assert "unsupported" in table
    assert "&lt;b&gt;no&lt;/b&gt; Ampere kernels here" in table
    assert "clocks throttled" in table
    assert "<b>" not in text


def test_the_roof_is_the_one_in_the_rows(files: list[Path], text: str) -> None:
    assert (
        "4,000 GB/s of memory traffic, 800 TFLOP/s of matrix products, which meet at 200 FLOP per byte"
        in text
    )
    assert "2,001 GB/s, 4 TFLOP/s" in text


def test_a_point_of_the_roofline_is_its_operations_per_byte_and_its_rate(folder: Path) -> None:
    from fa_research.compare.figures.roofline import _points

    lines = read_sweep(folder).parts[0].lines
    assert lines is not None
    points, roofs = _points(lines, "decode_step")
    # 4 TFLOP/s at 2,001 or 2,016 GB/s
    assert {(round(p["x"], 4), p["y"]) for p in points} == {(1.999, 4.0), (1.9841, 4.0)}
    assert set(roofs) == {(4000.0, 800.0)}


def test_a_ledgers_parts_end_where_the_sum_is() -> None:
    from fa_research.compare.figures.ledger import _Bar, _Said

    bar = _Bar("fa3", {}, {"metadata": 2.0, "attention": 6.0, "gap": 2.0}, 11.0)
    assert [(p["x"], p["end"]) for p in bar.pieces(_Said(1.0, "us", 1.0))] == [
        (0.0, 2.0),
        (2.0, 8.0),
        (8.0, 10.0),
    ]
    assert bar.pieces(_Said(1.0, "us", 10.0))[1]["description"] == "fa3: attention 6 us, 60.0 % of 10 us"


def test_a_front_leaves_out_what_another_beats_in_both() -> None:
    from fa_research.compare.figures.economics import front

    points = [{"x": x, "y": y} for x, y in ((1, 5), (2, 5), (3, 4), (2.5, 3), (4, 1), (3, 3.5))]
    assert [(p["x"], p["y"]) for p in front(points)] == [(2, 5), (3, 4), (4, 1)]


def test_replayed_traces_have_their_economics(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    rows = []
    for page in (1, 16, 64):
        found = {"live_requests_mean": 60.0 - page / 8, "tokens_per_s": 5e4 + 100 * page}
        found |= {"waste_fraction_mean": page / 400, "prefix_hit_fraction": 0.4 - page / 1000}
        rows.append(
            row_of(
                config_of(page=page),
                noisy(1000.0),
                **{f"trace_{name}": value for name, value in found.items()},
            )
        )
    files = write(write_sweep(tmp_path, *((row, ()) for row in rows)))
    assert {"pareto.png", "trace.png"} <= {path.name for path in files}
    text = files[0].read_text()
    assert "page size 64, 52 requests, 56,400 tokens/s" in text
    assert "page size 64: 16 %" in text  # of the slots in use


@pytest.mark.parametrize("metrics", [{}, {"trace_note": 1.0}])
def test_two_cells_without_a_gpu_have_a_report(tmp_path: Path, metrics: dict) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    rows = [
        row_of(config_of(name), decode_step_us=time, environment={"gpu": None, "cpu": "some CPU"}, **metrics)
        for name, time in (("torch", 2.0), ("triton", 3.0))
    ]
    files = write(write_sweep(tmp_path, *((row, ()) for row in rows)))
    assert [path.name for path in files] == ["report.html"]
    text = files[0].read_text()
    assert "CPU some CPU" in text
    assert "What is shown are times, no verdict: timed on a CPU." in text
    assert "best in" not in text
    assert "geometric mean" not in text


def test_one_backend_along_the_context_is_a_line(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    times = {key: time for key, time in TIMES.items() if key[0] == "fa3"}
    files = write(sweep(tmp_path, times))
    assert [path.name for path in files] == ["report.html", "latency.png"]


def test_units_of_several_workloads_are_parts_of_their_own(tmp_path: Path) -> None:
    other = config_of("fa3")
    other["workload"] = {"name": "extend", "level": "model", "batch_size": 4, "new_len": 64, "prefix_len": 0}
    rows = [row_of(config_of(name), decode_step_us=2.0) for name in ("fa3", "triton")]
    rows += [
        row_of(other | {"backend": config_of(name)["backend"]}, extend_pass_us=9.0)
        for name in ("fa3", "triton")
    ]
    found = read_sweep(write_sweep(tmp_path, *((row, ()) for row in rows)))
    assert [(part.metric, len(part.records)) for part in found.parts] == [(METRIC, 2), ("extend_pass_us", 2)]
    anchors = [comparison.anchor for part in found.parts for comparison in part.asked]
    assert len(anchors) == len(set(anchors)) == 2


def test_failures_alone_are_a_report(tmp_path: Path) -> None:
    rows = [row_of(config_of(name), status=Status.oom, environment={}) for name in ("fa3", "triton")]
    rows.append(Row(Status.error, reasons=["could not be composed"]))
    (page,) = write(write_sweep(tmp_path, *((row, ()) for row in rows)))
    text = page.read_text()
    assert "a reason to be oom" in text
    assert "could not be composed" in text
    assert {link[1:] for link in Page(text).links} <= set(Page(text).ids)


def test_rows_of_two_machines_are_compared_with_a_word(tmp_path: Path) -> None:
    rows = [
        row_of(config_of("fa3"), noisy(1.0)),
        row_of(config_of("triton"), noisy(2.0), environment=H200 | {"gpu": "NVIDIA H100"}),
    ]
    found = read_sweep(write_sweep(tmp_path, *((row, ()) for row in rows)))
    assert any("different machines" in note for note in found.notes)
    assert found.parts[0].asked[0].verdicts[0].best == ("fa3",)


def test_a_torn_line_and_an_older_version_are_said_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    old = config_of("fa3")
    del old["sampling"]
    path = write_rows(tmp_path / ROWS_FILE, row_of(old, noisy(1.0)), row_of(config_of("triton"), noisy(2.0)))
    with path.open("a") as file:
        file.write('{"status": "ok", "conf')
    text = write(tmp_path)[0].read_text()
    assert f"{path}:3 is not a row and was skipped" in text
    assert "another version of fa_research" in text


WITHOUT = """
import sys
from pathlib import Path
sys.modules["vl_convert"] = None
from fa_research.compare.sweep_report import write
print([path.name for path in write(Path(sys.argv[1]))])
assert not {"torch", "triton", "wandb"} & set(sys.modules)
"""


def test_without_the_extra_the_page_has_no_figures_and_the_extra_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(sweep(tmp_path, TIMES))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    note, names = done.stdout.splitlines()
    assert 'pip install -e ".[report]"' in note
    assert names == "['report.html']"
    assert "Every row" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "report.html").mkdir()  # where the page should go
    with CONSOLE.capture():
        ending._report(sweep(tmp_path, {("fa3", 1024): 1.0}), tracebacks=False)
    assert ["no report of this sweep" in record.getMessage() for record in caplog.records] == [True]
