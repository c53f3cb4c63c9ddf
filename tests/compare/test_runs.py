"""What may be ranked: several runs of a config, the drift between runs, CPUs, busy machines, answers that change the
result; and a study run again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fa_research.compare import compare, reproduce
from fa_research.compare.__main__ import main
from fa_research.compare.drift import Drift, spread_of
from fa_research.compare.estimates import estimate
from fa_research.compare.no_verdict import banner
from fa_research.compare.overview import read_sweep
from fa_research.compare.quality import Tradeoff, pareto
from fa_research.compare.reading import load
from fa_research.compare.sweep_report import write
from fa_research.compare.wording import outcome, regret_summary, summary
from fa_research.errors import ConfigError
from fa_research.tracking import ROWS_FILE, Row
from tests.compare.results import H200, METRIC, config_of, noisy, row_of, sweep, write_rows, write_sweep

TIMES = (100.0, 106.0, 112.0)
CPU = {"gpu": None, "cpu": "some CPU", "python": "3.12.3"}


def at(day: int, second: int = 0) -> str:
    return f"2026-01-{day:02d}T00:00:{second:02d}.000+00:00"


def test_runs_of_one_config_count_together_and_the_variance_between_them_widens_the_interval(
    tmp_path: Path,
) -> None:
    runs = [row_of(config_of(), noisy(time, seed=n), finished=at(n + 1)) for n, time in enumerate(TIMES)]
    for number, row in enumerate(runs):
        write_rows(tmp_path / str(number) / "rows.jsonl", row)
    (record,), notes = load([tmp_path])
    assert "1 config was measured in several runs (3 rows)" in "; ".join(notes)
    found = estimate(record, METRIC)
    assert found is not None and found.interval is not None
    assert found.value == pytest.approx((100.0 * 106.0 * 112.0) ** (1 / 3))
    assert found.runs == 3
    # Two degrees of freedom of 5.7 % beside ten of 1.07 %.
    assert found.run_sd == pytest.approx(((10 * 0.01066**2 + 2 * 0.0567**2) / 12) ** 0.5, rel=0.03)
    low, high = found.interval
    assert low < 104 and high > 108


def test_pooled_variance_is_that_of_simulated_runs() -> None:
    """One-way random effects with known components; many configs, so that the prior hardly counts."""
    drawn = np.random.default_rng(0)
    drift = Drift()
    for _ in range(300):
        centers = drawn.normal(0.0, 0.03, 3)
        drift.add("gpu", METRIC, [np.exp(center + drawn.normal(0.0, 0.01, 200)) for center in centers])
    assert drift.sd("gpu", METRIC) == pytest.approx(0.03, rel=0.08)
    assert "900 runs of 300 repeated configs" in drift.source("gpu", METRIC)


def test_95_percent_of_simulated_reruns_land_in_the_interval(tmp_path: Path) -> None:
    """Runs that differ as the published reproductions do."""
    (record,), _ = load([write_rows(tmp_path / ROWS_FILE, row_of(config_of(), noisy(100.0)))])
    found = estimate(record, METRIC)
    assert found is not None
    sd = 0.01066
    drawn = np.random.default_rng(1)
    offsets = drawn.normal(0.0, sd, 4000)
    reruns = 100.0 * np.exp(drawn.normal(0.0, sd, 4000) + drawn.normal(0.0, 0.0022, 4000))
    low, high = (end / 100.0 for end in reproduce.rerun_interval(found))
    published = 100.0 * np.exp(offsets)
    assert 0.94 < np.mean((reruns > published * low) & (reruns < published * high)) < 0.985


def test_cells_closer_than_the_drift_are_not_ranked_and_the_report_says_why(tmp_path: Path) -> None:
    close = {("fa3", 1024): 100.0, ("triton", 1024): 102.5, ("fa3", 4096): 100.0, ("triton", 4096): 106.0}
    found = compare([sweep(tmp_path, close)], "backend")
    near, far = found.verdicts
    assert near.is_tie and far.best == ("fa3",)
    assert "closer than the drift between runs" in outcome(found, found.cells[0], near)
    assert "closer than the drift" not in outcome(found, found.cells[1], far)
    assert found.drift == pytest.approx(spread_of(0.01066, 0.01066))


def test_rows_timed_in_turns_with_one_reference_are_ranked_by_it(tmp_path: Path) -> None:
    rows = []
    for name, ratio in (("fa3", 1.0), ("triton", 1.02)):
        config = config_of(name)
        config["measure"]["against"] = ["backend=fa3"]
        turns = {"ratio": ratio, "low": ratio * 0.998, "high": ratio * 1.002}
        metrics = {f"decode_step_against_{key}": value for key, value in turns.items()}
        rows.append(row_of(config, noisy(100.0), **metrics))
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    assert found.verdicts[0].best == ("fa3",)
    assert found.verdicts[0].costs["triton"].value == pytest.approx(1.02)
    assert found.drift == 0.0


@pytest.mark.parametrize(
    ("environment", "says"),
    [(CPU, "timed on a CPU"), (H200 | {"triton_interpreter": True}, "timed under Triton's interpreter")],
)
def test_times_of_a_cpu_and_of_the_interpreter_have_no_winner(
    tmp_path: Path, environment: dict, says: str
) -> None:
    rows = [
        row_of(config_of(name, context), noisy(time), environment=environment)
        for name, time in (("torch", 100.0), ("sdpa", 200.0))
        for context in (64, 128)
    ]
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    assert not found.ranked and not found.regrets[0]
    assert banner(found) == f"what is shown are times, no verdict: {says}"
    assert not any("best" in line for line in [*summary(found), regret_summary(found)])
    assert (
        main(
            [str(tmp_path), "-q", "backend", "--regret", "--out", str(tmp_path.parent / f"{tmp_path.name}_o")]
        )
        == 0
    )


def test_no_time_has_a_verdict_on_a_cpu_and_a_quality_has(tmp_path: Path) -> None:
    rows = [
        row_of(config_of(name), noisy(100.0), environment=CPU, top1_agreement=agreement)
        for name, agreement in (("torch", 0.5), ("sdpa", 0.9))
    ]
    found = compare(
        [write_rows(tmp_path / ROWS_FILE, *rows)], "backend", metric="top1_agreement", higher=True
    )
    assert found.verdicts[0].best == ("sdpa",)


def test_cells_timed_side_by_side_and_samples_that_scatter_are_said(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(("torch", "sdpa")):
        row = row_of(config_of(name), noisy(100.0 + number, spread=0.5), environment=CPU)
        row.started, row.finished = at(1, number), at(1, number + 30)
        rows.append(row)
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    said = " ".join(found.notes)
    assert "2 rows were timed while another cell ran on the same CPU" in said
    assert "2 rows have samples that scatter by more than 2x" in said


def test_a_busy_gpu_cell_is_not_judged_and_the_others_are(tmp_path: Path) -> None:
    def row(name: str, context: int, spread: float) -> Row:
        return row_of(config_of(name, context), noisy({"fa3": 100.0, "triton": 150.0}[name], spread=spread))

    rows = [
        row(name, context, spread) for name in ("fa3", "triton") for context, spread in ((1, 0.5), (2, 0.01))
    ]
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    assert not found.verdicts[0].best and "busy" in found.verdicts[0].unjudged
    assert found.verdicts[1].best == ("fa3",)
    assert "in 1 of 2 cells" in banner(found)


def masks(tmp_path: Path, environment: dict) -> Path:
    cells = []
    for size, time, bits in ((128, 100.0, 0.9), (512, 120.0, 0.95), (1024, 150.0, 0.7)):
        config = config_of()
        config["model"]["mask"] = {"name": "sliding_window", "size": size, "options": {}}
        samples = noisy(time, seed=size)
        metrics = {"bits_per_byte": bits, "top1_agreement": 0.9}
        cells.append((row_of(config, samples, environment=environment, **metrics), samples))
    return write_sweep(tmp_path / "sweep", *cells)


def test_answers_that_change_the_result_are_weighed_by_quality_not_by_time(tmp_path: Path) -> None:
    found = compare([masks(tmp_path, H200)], "model.mask.size")
    assert not found.ranked
    (cell,), (verdict,) = found.cells, found.verdicts
    said = outcome(found, cell, verdict)
    assert said == "bits per byte: 128 0.9, 512 0.95, 1024 0.7; on the Pareto front: 128, 1024"
    assert "no value of it is best by time" in regret_summary(found)
    assert "bits per byte 0.95" in summary(found)[1]


def test_a_sweep_of_masks_has_a_pareto_figure_and_no_headline_by_speed(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    files = write(masks(tmp_path, H200))
    assert any(path.name.startswith("pareto") for path in files)
    text = files[0].read_text()
    assert "always model.mask" not in text and "weigh quality against it" in text


def test_points_on_the_front_are_beaten_by_none() -> None:
    points = [
        Tradeoff(n, t, {"bits_per_byte": q})
        for n, t, q in (("a", 1, 3), ("b", 2, 2), ("c", 3, 2), ("d", 4, 1))
    ]
    assert [point.label for point in pareto(points, "bits_per_byte", higher=False)] == ["a", "b", "d"]


def test_one_cell_has_no_mean_and_many_name_their_axes(tmp_path: Path) -> None:
    one = compare([sweep(tmp_path / "a", {("fa3", 1024): 100.0, ("triton", 1024): 120.0})], "backend")
    assert regret_summary(one).startswith("backend: fa3; triton 20 %")
    many = {
        (name, context): base
        for name, base in (("fa3", 100.0), ("triton", 120.0))
        for context in (1024, 4096)
    }
    text = regret_summary(compare([sweep(tmp_path / "b", many)], "backend"))
    assert "geometric mean over 2 cells (context_len 1024, 4096)" in text


def test_a_sweep_leads_with_every_choice(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    cells = []
    for name, page in ((n, p) for n in ("fa3", "triton") for p in (1, 64)):
        samples = noisy({"fa3": 100.0, "triton": 120.0}[name] * (1 + 0.1 / page))
        cells.append((row_of(config_of(name, page=page), samples), samples))
    folder = write_sweep(tmp_path, *cells)
    assert len(read_sweep(folder).parts[0].asked) == 2
    head = write(folder)[0].read_text().partition("<nav>")[0]
    assert "always backend=fa3" in head and "always kv.page_size=64" in head


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", b'{"name": "x", "values": [1]}\n' * 550, "has 550 lines, none of them a row"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\x00\x01\xff" * 100, "is no text file"),
        ("config.yaml", b"a: 1\nb: 2\n", "is no JSON lines but .yaml"),
    ],
)
def test_a_file_that_is_no_rows_is_one_line(
    tmp_path: Path, name: str, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name), "-q", "backend"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") <= 2


def test_many_lines_that_are_no_rows_among_rows_are_one_note(tmp_path: Path) -> None:
    path = write_rows(tmp_path / ROWS_FILE, row_of(config_of(), noisy(1.0)))
    with path.open("a") as file:
        file.write('{"no": "row"}\n' * 100)
    (note,) = load([path])[1]
    assert "100 lines are no rows and were skipped" in note


def test_a_ledger_has_one_unit_in_axis_labels_and_tooltips(tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="needs the extra report")
    from fa_research.compare.figures.ledger import ledger_figures

    rows = []
    for name, whole in (("fa3", 8000.0), ("triton", 9000.0)):
        parts = {"decode_step_ledger_attention_us": 6000.0, "decode_step_ledger_model_us": 2000.0}
        rows.append(row_of(config_of(name), noisy(whole), **parts))
    (figure,) = ledger_figures(compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend"))
    text = json.dumps(figure.chart.to_dict())
    assert figure.title == "Time breakdown of the decode step"
    assert "decode step (ms)" in text and '"8 ms"' in text and '"8 ms (whole 9 ms)"' in text
    assert " us" not in text


# A study run again.


def test_rows_of_another_gpu_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi: no GPU
    path = write_rows(tmp_path / ROWS_FILE, row_of(config_of(), noisy(1.0)))
    assert main(["--reproduce", str(path)]) == 2
    assert "the rows are of NVIDIA H200, and this machine has no GPU" in capsys.readouterr().err


def test_a_study_with_a_script_of_its_own_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / ROWS_FILE, row_of({"variant": "a"}, noisy(1.0)))
    with pytest.raises(ConfigError, match="none of the 1 row was made by run.py"):
        reproduce.reproduce([path], cells=1, seed=0, across=False)


def test_options_of_other_tasks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reproduce", str(tmp_path), "--regret"]) == 2
    assert "--regret belongs to --question" in capsys.readouterr().err
    assert main([str(tmp_path), "-q", "backend", "--cells", "3"]) == 2
    assert "--cells belongs to --reproduce" in capsys.readouterr().err


def test_a_published_cell_is_run_again_by_run_py_and_held_against_its_interval(tmp_path: Path) -> None:
    """A real cell of the smallest size: once as published, once with a published time that no rerun reaches."""
    config = config_of("torch", context=16, page=4)
    small = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config["model"] |= small | {"intermediate_size": 32, "vocab_size": 64, "changed": None, "key_of_old": 1}
    config["workload"] |= {"level": "attention", "num_layers": 1, "steps": 2}
    config["measure"] |= {"warmup": 1, "repeats": 3, "ledger": False, "self_test": False, "max_seconds": 1.0}
    row = row_of(config, noisy(1e9), environment=CPU)
    path = write_rows(tmp_path / "study" / "results" / ROWS_FILE, row)
    found, folder = reproduce.reproduce([path], cells=5, seed=0, across=False, out=tmp_path / "new")
    (again,) = found
    assert again.metric == METRIC and again.now is not None and not again.is_inside
    assert again.missed > 0.9
    assert "0 of 1 number inside" in reproduce.summary(found)[0]
    (rerun,), _ = load([folder])
    kept = ("backend", "workload", "kv", "seed")
    assert {key: rerun.row.config[key] for key in kept} == {key: config[key] for key in kept}
    assert rerun.row.config["model"]["hidden_size"] == 32
