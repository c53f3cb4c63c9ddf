"""`measure.against`: a second engine in the same process, checked like the first and timed in turns with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from fa_research import runner
from fa_research.backends import BackendSettings
from fa_research.config import (
    Config,
    DecodeWorkload,
    ExtendWorkload,
    KVConfig,
    config_hash,
    load_config,
    to_plain,
)
from fa_research.config.against import read_against
from fa_research.config.store import CONFIG_DIR, register
from fa_research.engine import engine as engine_module
from fa_research.errors import BackendUnavailable, ConfigError
from fa_research.measure.against import verdict
from fa_research.measure.pairs import Pairs
from fa_research.runner import run_cell
from fa_research.tracking import ROWS_FILE, Row, Status, failed_row, read_rows
from tests.measure.broken import DropsLastKey
from tests.workloads.cells import cell


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        yield


TYPED = ["backend=torch", "model=tiny", "workload=decode", "kv.page_size=16"]


def second(*against: str, typed: list[str] = TYPED) -> Config | None:
    typed = [*typed, f"measure.against={[*against]}"]
    return read_against(load_config(compose("config", typed)), "config", typed)


def test_the_second_config_is_the_first_with_the_overrides() -> None:
    assert second() is None
    found = second("kv.page_size=4", "backend=triton", "cuda_graph.batch_sizes=[2,4]")
    wanted = load_config(
        compose("config", [*TYPED, "kv.page_size=4", "backend=triton", "cuda_graph.batch_sizes=[2,4]"])
    )
    assert found is not None
    assert to_plain(found) == to_plain(wanted)


def test_what_a_preset_chose_stays() -> None:
    typed = ["experiment=first_ablation", "backend=torch", "kv.page_size=2"]
    found = second("backend=triton", typed=typed)
    wanted = load_config(compose("config", [*typed, "backend=triton"]))
    assert found is not None and to_plain(found) == to_plain(wanted)


@pytest.mark.parametrize(
    ("against", "parts"),
    [
        ("kv.pagesize=4", ["kv.pagesize", "did you mean kv.page_size"]),
        ("kv.page_size=many", ["kv.page_size='many'", "an integer"]),
        ("kv.page_size=0", ["kv.page_size=0", "from 1 to 256"]),
        ("backend=nope", ["nope", "triton"]),
        ("backend", ["cannot read the override 'backend'"]),
        ("+kv.foo=1", ["unknown key kv.foo"]),
        ("device=cpu", ["device is of the run", "backend, kv"]),
        ("measure.l2=warm", ["measure.l2 is of the run"]),
        ("experiment=first_ablation", ["experiment is of the run"]),
        ("workload=generate", ["workload=generate times one text", "use workload=text"]),
    ],
)
def test_mistakes_name_the_key(against: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        second(against)
    for part in [f"measure.against=['{against}']: ", *parts]:
        assert part in str(refused.value)


def run(config: Config, against: Config, folder: Path) -> Row:
    config.measure.against = ["kv.page_size=4"]
    row = run_cell(config, resolved=to_plain(config), output_dir=folder, multirun=True, against=against)
    (written,) = read_rows(folder / ROWS_FILE)
    assert written == row
    return row


@pytest.mark.parametrize("name", ["decode", "extend", "text"])
def test_the_row_has_the_ratio_of_samples_that_are_in_it(name: str, tmp_path: Path) -> None:
    config, against = cell(name), cell(name, page_size=4)
    row = run(config, against, tmp_path)
    assert row.status is Status.ok, row.reasons
    assert row.metrics["against"] == "kv.page_size=4"
    units = {"decode": ["decode_step"], "extend": ["extend_pass"], "text": ["prefill", "decode_step"]}[name]
    for unit in units:
        ours, theirs = row.samples[f"{unit}_against_first_us"], row.samples[f"{unit}_against_us"]
        columns = {
            key: row.metrics[f"{unit}_against_{key}"] for key in ("us", "ratio", "low", "high", "pairs")
        }
        assert columns["us"] == pytest.approx(median(theirs), abs=1e-3)
        assert columns["ratio"] == pytest.approx(median(ours) / median(theirs), rel=1e-3)
        assert columns["low"] <= columns["ratio"] <= columns["high"]
        assert columns["pairs"] == len(ours) == len(theirs) == 30
        (said,) = [note for note in row.notes if note.startswith(f"{unit}: ") and "kv.page_size=4" in note]
        assert ("a tie" in said) == (columns["low"] <= 1 <= columns["high"])
        # The cell's own times are as they are without a second engine.
        assert row.metrics[f"{unit}_count"] == len(row.samples[f"{unit}_us"])
    assert row.checks["logits_passed"] is row.checks["against_logits_passed"] is True
    assert row.environment["against"]["backend"] == "torch"


def test_the_hash_knows_it() -> None:
    config = cell("decode")
    before = config_hash(config)
    config.measure.against = ["kv.page_size=4"]
    assert config_hash(config) != before


def test_a_second_engine_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = engine_module.create

    def broken_where_pages_are_small(name: str, settings: BackendSettings, specs: Any) -> Any:
        made = DropsLastKey if settings.page_size == 4 else None
        return made(settings, specs) if made else create(name, settings, specs)

    monkeypatch.setattr(engine_module, "create", broken_where_pages_are_small)
    row = run(cell("decode"), cell("decode", page_size=4), tmp_path)
    assert row.status is Status.inaccurate and not row.samples
    assert row.checks["logits_passed"] is True and row.checks["against_logits_passed"] is False
    assert row.reasons[0].startswith("measure.against=['kv.page_size=4']: differs from")
    assert not [name for name in row.metrics if name.endswith("_us")]


def test_units_that_differ_are_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"times extend_pass, this cell decode_step"):
        run(cell("decode"), cell("extend"), tmp_path)


def test_a_backend_that_cannot_run_here_is_told_to_be_the_second(tmp_path: Path) -> None:
    against = cell("decode", backend="fa3", device="cpu")
    with pytest.raises(BackendUnavailable, match=r"measure\.against: "):
        run(cell("decode"), against, tmp_path)


def test_memory_for_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second engine's allocation fails: the row says that there were two."""
    build = runner.build_cell

    def one_fits(config: Config) -> Any:
        if config.kv.page_size == 4:
            raise MemoryError("no room")
        return build(config)

    monkeypatch.setattr(runner, "build_cell", one_fits)
    with pytest.raises(MemoryError) as failure:
        run(cell("decode"), cell("decode", page_size=4), tmp_path)
    row = failed_row(failure.value)
    assert row.status is Status.oom and "second engine beside the first" in row.reasons[0]


@pytest.mark.parametrize(
    ("low", "ratio", "high", "word"),
    [
        (0.9, 1.0, 1.1, "a tie"),
        (0.9, 0.95, 1.0, "a tie"),
        (0.7, 0.8, 0.9, "faster"),
        (1.01, 1.1, 1.2, "slower"),
    ],
)
def test_in_words(low: float, ratio: float, high: float, word: str) -> None:
    said = verdict("decode_step", Pairs((1.0,), (1.0,), ratio, low, high), "backend=triton")
    assert word in said and "backend=triton" in said


def test_decode_steps_stay_within_the_room_that_was_reserved(tmp_path: Path) -> None:
    """Thirty pairs of a unit with two steps: it is put back between, as after every series."""
    options = DecodeWorkload(batch_size=2, context_len=14, steps=2)
    config, against = cell(options), cell(dataclasses.replace(options), page_size=4)
    config.kv, against.kv = KVConfig(16), KVConfig(4)
    row = run(config, against, tmp_path)
    assert row.metrics["decode_step_against_pairs"] == 30


def test_a_pass_of_another_size_is_compared_too(tmp_path: Path) -> None:
    row = run(
        cell(ExtendWorkload(batch_size=1, new_len=5)), cell(ExtendWorkload(batch_size=2, new_len=5)), tmp_path
    )
    assert row.status is Status.ok
