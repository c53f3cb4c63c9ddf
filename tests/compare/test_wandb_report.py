"""A comparison as a report on W&B, as far as it goes without a login: what is missing is named, what would be sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare.__main__ import main
from fa_research.compare.comparison import Comparison, compare
from fa_research.compare.wandb_report import Place, build, place_of, publish
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE
from tests.compare.results import METRIC, config_of, noisy, row_of, sweep, write_sweep

RUN = {"project": "lab", "group": "sweep", "entity": "us"}


def cells(folder: Path, *places: dict[str, str]) -> Path:
    """Two backends at two contexts, with the W&B runs in turns at `places`."""
    made: list[Any] = []
    for number, (backend, context) in enumerate((b, c) for b in ("fa3", "triton") for c in (1024, 4096)):
        samples = noisy(context * (1.0 if backend == "fa3" else 2.0), seed=number)
        row = row_of(config_of(backend, context), samples)
        place = places[number % len(places)]
        row.wandb = place and place | {"run_id": f"run{number}"}
        made.append((row, samples))
    return write_sweep(folder, *made)


def compared(folder: Path, *places: dict[str, str]) -> Comparison:
    return compare([cells(folder, *places)], "backend")


def test_without_login_and_extra_one_line_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with CONSOLE.capture():
        assert main([str(cells(tmp_path, RUN)), "-q", "backend", "--wandb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`wandb login`" in line and 'pip install -e ".[wandb-report]"' in line
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with CONSOLE.capture():
        assert main([str(tmp_path), "-q", "backend", "--wandb"]) == 2
    assert "login" not in capsys.readouterr().err


def test_closure_makes_no_report_on_w_and_b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep(tmp_path, {("fa3", 1024): 1.0})), "--closure", "--wandb"]) == 2
    assert "--wandb belong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([{}], "none of the rows compared has a W&B run"),
        ([RUN, RUN | {"project": "other"}], "projects lab, other"),
        ([RUN, RUN | {"entity": "them"}], "belong to them, us"),
    ],
)
def test_rows_that_make_no_one_report_are_refused(
    places: list[dict[str, str]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        place_of(compared(tmp_path, *places))


def test_the_place_is_that_of_the_rows(tmp_path: Path) -> None:
    offline = {"project": "lab", "group": "another"}
    assert place_of(compared(tmp_path / "a", RUN, offline)) == Place("us", "lab", ("another", "sweep"))
    assert place_of(compared(tmp_path / "b", offline, {})) == Place(None, "lab", ("another",))


def test_what_would_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    pytest.importorskip("wandb_workspaces", reason="the extra wandb-report is not installed")
    comparison = compared(tmp_path, RUN | {"group": 'it\'s "one"'})
    report = build(comparison, place_of(comparison), "us")
    assert (report.entity, report.project, report.title) == ("us", "lab", "backend by decode step (us)")
    sent = json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    (text,) = (block["content"] for block in sent["blocks"] if block["type"] == "markdown-block")
    assert "backend=fa3: best in 2 of 2 cells" in text
    assert "[**1,024**](https://wandb.example.org/us/lab/runs/run0)" in text and "#row" not in text
    of_cells, of_sweeps = (block["metadata"] for block in sent["blocks"] if block["type"] == "panel-grid")
    for grid, operator in ((of_cells, "!="), (of_sweeps, "=")):
        (run_set,) = grid["runSets"]
        assert [(f["key"]["name"], f["op"], f["value"]) for f in run_set["filters"]["filters"]] == [
            ("group", "IN", ['it\'s "one"']),
            ("jobType", operator, "sweep"),
        ]
    assert of_cells["runSets"][0]["grouping"] == [{"section": "config", "name": "backend.value.name"}]
    bar, points = (panel["config"] for panel in of_cells["panelBankSectionConfig"]["panels"])
    assert (bar["metrics"], bar["groupBy"]) == ([f"summary_metrics.metrics/{METRIC}"], "backend.value.name")
    assert (points["xAxis"], points["yAxis"]) == (
        "config:workload.value.context_len",
        f"summary:metrics/{METRIC}",
    )
    lines, *_ = (panel["config"] for panel in of_sweeps["panelBankSectionConfig"]["panels"])
    assert (lines["xAxis"], lines["metricRegex"]) == (
        "axis/context_len",
        f"along_context_len/{METRIC}/.*",
    )


def test_what_w_and_b_refuses_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra wandb-report is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    with pytest.raises(ConfigError, match="W&B did not take the report"):
        publish(compared(tmp_path, RUN))
