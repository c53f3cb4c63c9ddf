"""A model's step from its kernels: predictions that one can work out by hand, and reasons where there are none."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare.__main__ import main
from fa_research.compare.closure import Closure, close
from fa_research.compare.closure_ledger import missed, missed_line
from fa_research.compare.kernel_rows import keys_seen, path_us, rest_bytes
from fa_research.compare.reading import Record
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE, ROWS_FILE, Row, Status
from tests.compare.results import H200, config_of, row_of, write_rows

WEIGHTS = 8_000_000_000  # bytes; the tables and logits of config_of's tiny model are lost in it
ROOF = 4000.0  # GB/s
REST = 1.25  # what the rest of the model takes, over its bytes at the roof


def attention_time(backend: str, batch: int, context: int) -> float:
    """Of all layers: something constant, and something in proportion to the bytes."""
    return (20.0 if backend == "fa3" else 30.0) + batch * context / (64.0 if backend == "fa3" else 40.0)


def kernel_row(backend: str, context: int, batch: int, *, layers: int | None = None, **options: Any) -> Row:
    config = config_of(backend, context, batch)
    config["workload"] |= {"level": "attention", "num_layers": layers}
    time = attention_time(backend, batch, context)
    share = (layers or 2) / 2  # metadata is made once
    parts = {"metadata_us": 0.1 * time, "kv_write_us": 0.2 * time * share, "attention_us": 0.7 * time * share}
    return row_of(config, **(parts | options))


def model_row(backend: str, context: int, batch: int, **options: Any) -> Row:
    config = config_of(backend, context, batch)
    row = row_of(config, decode_step_us=1.0, model_weight_bytes=WEIGHTS, roof_GB_per_s=ROOF, **options)
    known = rest_bytes(record_of(row))
    assert known is not None
    row.metrics["decode_step_us"] = attention_time(backend, batch, context) + REST * known / ROOF / 1e3
    return row


def record_of(row: Row) -> Record:
    from fa_research.tracking.columns import flat

    return Record(row, Path("rows.jsonl"), 1, flat(row.config))


CELLS = [
    (backend, context, batch) for backend in ("fa3", "triton") for context in (1024, 4096) for batch in (1, 8)
]


def closed(folder: Path, kernels: list[Row], models: list[Row], **options: Any) -> Closure:
    paths = [
        write_rows(folder / "kernels" / ROWS_FILE, *kernels),
        write_rows(folder / "models" / ROWS_FILE, *models),
    ]
    return close(paths, **options)


def test_a_rest_that_is_in_proportion_to_its_bytes_is_found(tmp_path: Path) -> None:
    found = closed(tmp_path, [kernel_row(*cell) for cell in CELLS], [model_row(*cell) for cell in CELLS])
    assert len(found.cells) == 8
    (fitted,) = found.fitted
    assert (fitted.where["workload.batch_size"], fitted.where["workload.context_len"]) == (1, 1024)
    for cell in found.cells:
        if cell is not fitted:
            assert cell.error("one cell") == pytest.approx(0.0, abs=1e-9)
        assert cell.error("leave one out") == pytest.approx(0.0, abs=1e-9)
        attention = cell.attention_us
        by_bytes = attention + (cell.measured - attention) / REST  # the bytes alone know nothing of the 25 %
        assert cell.predicted["bytes"] == pytest.approx(by_bytes)
    assert fitted.error("one cell") is None
    summary = found.summary()
    assert [count for *_, count in summary.values()] == [8, 7, 8]
    assert summary["bytes"][1] < 0


def test_the_worst_error_is_of_the_cell_that_is_off(tmp_path: Path) -> None:
    models = [model_row(*cell) for cell in CELLS]
    models[-1].metrics["decode_step_us"] *= 2
    found = closed(tmp_path, [kernel_row(*cell) for cell in CELLS], models)
    middle, worst, cell, _ = found.summary()["leave one out"]
    assert middle == pytest.approx(0.0, abs=1e-9)
    assert worst == pytest.approx(-0.5)
    assert cell.where["backend.name"] == "triton"


def test_contexts_between_two_that_were_measured_are_joined_by_bytes(tmp_path: Path) -> None:
    kernels = [kernel_row("fa3", context, 1) for context in (1024, 4096)]
    found = closed(tmp_path, kernels, [model_row("fa3", context, 1) for context in (1024, 2048)])
    between = found.cells[1]
    assert between.attention_us == pytest.approx(attention_time("fa3", 1, 2048))
    assert between.source.startswith("between ")


def test_some_layers_stand_for_all_where_they_are_alike(tmp_path: Path) -> None:
    found = closed(tmp_path, [kernel_row("fa3", 1024, 1, layers=1)], [model_row("fa3", 1024, 1)])
    assert found.cells[0].attention_us == pytest.approx(attention_time("fa3", 1, 1024))
    assert found.fitted == []  # one cell has no other to predict
    models = [model_row("fa3", 1024, 1)]
    kernels = [kernel_row("fa3", 1024, 1, layers=1)]
    for row in (*models, *kernels):
        row.config["model"]["local"]["pattern"] = [True, False]
    with pytest.raises(ConfigError, match=r"its layers differ.*workload\.num_layers"):
        closed(tmp_path / "local", kernels, models)


def test_the_path_is_the_rows_own_step_and_metadata_is_in_it_once() -> None:
    step = {"metadata_us": 200.0, "kv_write_us": 3.0, "attention_us": 20.0, "decode_step_us": 30.0}
    alone = record_of(kernel_row("fa3", 1024, 1, layers=2, **step))  # a call of metadata is the host's time
    assert path_us(alone) == 30.0
    assert path_us(alone, 8) == pytest.approx(7.0 + 4 * 23.0)
    ledger = record_of(kernel_row("fa3", 1024, 1, layers=2, decode_step_ledger_metadata_us=6.0, **step))
    assert path_us(ledger, 8) == pytest.approx(6.0 + 4 * 24.0)
    ledger.config["backend.metadata"] = "per_layer"
    assert path_us(ledger, 8) == pytest.approx(4 * 30.0)
    assert path_us(record_of(row_of(config_of("fa3", 1024, 1), attention_us=20.0))) is None


def test_a_row_of_all_layers_goes_before_a_later_one_of_some(tmp_path: Path) -> None:
    some = kernel_row("fa3", 1024, 1, layers=1, finished="2099-01-01T00:00:00+00:00")
    some.metrics["attention_us"] = 1000.0
    some.config_hash = "11111111"
    found = closed(tmp_path, [kernel_row("fa3", 1024, 1, layers=2), some], [model_row("fa3", 1024, 1)])
    assert found.cells[0].attention_us == pytest.approx(attention_time("fa3", 1, 1024))


def test_a_step_that_waits_for_the_host_is_left_out(tmp_path: Path) -> None:
    models = [model_row("fa3", context, 1) for context in (1024, 4096)]
    models[0].metrics["decode_step_host_us"] = 0.6 * models[0].metrics["decode_step_us"]
    models[1].metrics["decode_step_host_us"] = 0.4 * models[1].metrics["decode_step_us"]
    kernels = [kernel_row("fa3", context, 1) for context in (1024, 4096)]
    found = closed(tmp_path, kernels, models)
    assert [cell.record.config["workload.context_len"] for cell in found.cells] == [4096]
    assert any("1 of 2 rows of a model are left out: the host" in note for note in found.notes)
    with pytest.raises(ConfigError, match="1 of 1 rows of a model are left out: the host"):
        closed(tmp_path / "alone", kernels, models[:1])


def test_what_bytes_miss_adds_up_and_is_told_by_the_ledger(tmp_path: Path) -> None:
    ledger = {"host_plan": 0.0, "metadata": 2.0, "kv_write": 5.0, "attention": 40.0, "combine": 3.0}
    ledger |= {"model": 2600.0, "sampling": 7.0, "gap": 90.0}
    model = model_row("fa3", 1024, 1)
    model.metrics |= {f"decode_step_ledger_{part}_us": value for part, value in ledger.items()}
    (cell,) = closed(tmp_path, [kernel_row("fa3", 1024, 1)], [model]).cells
    parts = missed(cell)
    assert parts is not None
    assert parts["attention path"] == pytest.approx(50.0 - attention_time("fa3", 1, 1024))
    assert (parts["sampling"], parts["gap"]) == (7.0, 90.0)
    assert parts["model"] == pytest.approx(2600.0 - (cell.measured - cell.attention_us) / REST)
    assert sum(parts.values()) == pytest.approx(cell.measured - cell.predicted["bytes"])
    closure = closed(tmp_path / "line", [kernel_row("fa3", 1024, 1)], [model])
    assert missed_line(closure)[0].startswith("what bytes miss, by the ledgers of 1 cell,")
    del model.metrics["decode_step_ledger_gap_us"]
    closure = closed(tmp_path / "none", [kernel_row("fa3", 1024, 1)], [model])
    assert missed_line(closure) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv": {"page_size": 64}}, r"closest kernel row.*differs in kv\.page_size \(1 and 64\)"),
        ({"workload": {"batch_size": 4}}, r"no kernel row has workload\.batch_size=1"),
        ({"workload": {"context_len": 2048}}, r"workload\.context_len=1024 does not lie between.*\(2048\)"),
        ({"model": {"num_kv_heads": 1}}, r"model\.num_kv_heads \(2 and 1\)"),
    ],
)
def test_why_no_row_matches_is_said(tmp_path: Path, change: dict[str, dict[str, Any]], said: str) -> None:
    kernel = kernel_row("fa3", 1024, 1)
    for group, values in change.items():
        kernel.config[group] |= values
    kernel.config_hash = "11111111"
    with pytest.raises(ConfigError, match=said):
        closed(tmp_path, [kernel], [model_row("fa3", 1024, 1)])


def test_rows_of_one_level_alone_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workload=decode with workload\.level=attention.*given: 2 rows"):
        closed(tmp_path / "a", [], [model_row("fa3", 1024, 1), model_row("triton", 1024, 1)])
    failed = model_row("fa3", 1024, 1)
    failed.status = Status.oom
    with pytest.raises(ConfigError, match=r"workload=decode with workload\.level=model and decode_step_us"):
        closed(tmp_path / "b", [kernel_row("fa3", 1024, 1)], [failed])


def test_another_machine_asks_for_across(tmp_path: Path) -> None:
    kernels = [kernel_row("fa3", 1024, 1, environment=H200 | {"gpu": "NVIDIA H100"})]
    with pytest.raises(ConfigError, match=r"gpu \(NVIDIA H100 and NVIDIA H200\); --across"):
        closed(tmp_path, kernels, [model_row("fa3", 1024, 1)])
    assert len(close([tmp_path], across=True).cells) == 1


@pytest.mark.parametrize(
    ("changes", "context", "seen"),
    [
        ({}, 1000, 2000),
        ({"model.mask.name": "sliding_window", "model.mask.size": 512}, 1000, 1024),
        ({"model.mask.name": "chunked", "model.mask.size": 256}, 1000, 2 * (1000 - 768)),
        ({"model.local.pattern": [True, False], "model.local.mask.size": 100}, 1000, 1100),
    ],
)
def test_keys_that_a_new_token_sees(changes: dict[str, Any], context: int, seen: int) -> None:
    config = record_of(Row(Status.ok, config_of())).config | changes
    assert keys_seen(config, context) == seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "qk_norm": True, "qkv_bias": True},
        {"moe": {"num_experts": 8, "experts_per_token": 2, "norm_topk_prob": True, "bias": True}},
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_bytes_of_the_rest_are_those_that_the_model_counts(changes: dict[str, Any], batch: int) -> None:
    torch = pytest.importorskip("torch")
    from dataclasses import replace

    from fa_research.config import Dtype, ModelConfig, MoEConfig
    from fa_research.models import Decoder

    known = {"moe": MoEConfig(**changes["moe"])} if "moe" in changes else changes
    config = replace(ModelConfig(dtype=Dtype.bfloat16), **known)
    model = Decoder(config, dtype=torch.bfloat16, device="meta")
    row = model_row("fa3", 128, batch)
    row.config["model"] |= changes | {"dtype": "bfloat16"}
    row.metrics["model_weight_bytes"] = model.weight_bytes
    logits = 2 * batch * config.vocab_size * 2
    assert rest_bytes(record_of(row)) == pytest.approx(model.step_weight_bytes(batch, batch) + logits, abs=2)


def test_the_command_shows_and_writes_it(tmp_path: Path) -> None:
    closed(tmp_path / "in", [kernel_row(*cell) for cell in CELLS], [model_row(*cell) for cell in CELLS])
    pytest.importorskip("vl_convert", reason="needs the extra report")
    out = tmp_path / "out"
    with CONSOLE.capture() as capture:
        code = main([str(tmp_path / "in"), "--closure", "--out", str(out)])
    assert code == 0
    text = capture.get()
    assert "leave one out: 0.0 % off at the median" in text
    assert "one cell: fitted to backend=fa3, batch_size=1, context_len=1024" in text
    assert {path.name for path in out.iterdir()} == {"closure.csv", "closure.md", "closure.png"}
    with (out / "closure.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    for line in lines:
        path, _, number = line["kernel_rows"].rpartition(":")
        assert Path(path).read_text().splitlines()[int(number) - 1]
        error = float(line["bytes_us"]) / float(line["decode_step_us"]) - 1
        assert float(line["bytes_error"]) == pytest.approx(error)
    assert "![Errors of the prediction](closure.png)" in (out / "closure.md").read_text()


def test_options_of_the_other_question_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--closure", "--regret"]) == 2
    assert "--regret belongs to --question" in capsys.readouterr().err
