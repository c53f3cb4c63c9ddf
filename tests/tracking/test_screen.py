"""The screen: clean in a pipe, one console on a terminal, tables of what varies."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fa_research.tracking import CONSOLE, Row, Status, print_table, stages
from fa_research.tracking.columns import format_value, varying_keys
from fa_research.tracking.screen import headline

ROOT = Path(__file__).resolve().parents[2]

PROGRESS = """
import logging
from fa_research.tracking.bars import progress
from fa_research.tracking.screen import CONSOLE, log_handler
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_handler()])
with progress("timing", 3) as advance:
    for step in range(3):
        logging.getLogger("fa_research.x").info("a log line of step %d " + "with much text " * 20 + "end", step)
        with progress("inner", 2) as inner:
            inner()
            inner(1)
        advance()
logging.getLogger("jax._src.xla_bridge").info("Unable to initialize backend 'tpu'")
logging.getLogger("jax").warning("beware")
CONSOLE.print("done")
"""


def test_in_a_pipe_there_are_whole_lines_and_no_control_characters() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS], cwd=ROOT, capture_output=True, check=True)
    assert b"\r" not in done.stdout
    assert b"\x1b" not in done.stdout
    lines = done.stdout.decode().splitlines()
    assert sum(line.startswith("a log line") and line.endswith("end") for line in lines) == 3
    assert lines[-2:] == ["beware", "done"] and "tpu" not in done.stdout.decode(), (
        "others' lines from warnings on"
    )
    assert done.stderr == b""


def test_on_a_terminal_a_bar_is_drawn_and_log_lines_stay_whole() -> None:
    controller, terminal = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "50"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRESS], cwd=ROOT, stdout=terminal, stderr=terminal, env=env
    )
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(controller, 65536):
            output += chunk
    except OSError:  # Linux reports the closed terminal so
        pass
    finally:
        os.close(controller)
    assert child.wait() == 0
    assert b"timing" in output
    assert b"3/3" in output
    for step in range(3):  # longer than the terminal is wide, and in one piece
        assert f"a log line of step {step} {'with much text ' * 20}end".encode() in output
    assert b"Traceback" not in output


def test_a_sweep_shows_what_varies_with_statuses_metrics_and_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = {"backend": {"name": "torch"}, "kv": {"page_size": 1, "churn": True}}
    other = {"backend": {"name": "fa3"}, "kv": {"page_size": 1, "churn": True}}
    print_table(
        [
            Row(Status.ok, config=base, metrics={"decode_us": 12.3456, "bytes": 1234567}),
            Row(Status.unsupported, config=other, reasons=["no Hopper GPU"]),
        ]
    )
    shown = capsys.readouterr().out
    for part in (
        "backend.name",
        "torch",
        "fa3",
        "decode_us",
        "12.35",
        "1,234,567",
        "unsupported",
        "no Hopper GPU",
    ):
        assert part in shown
    assert "churn" not in shown
    assert "page_size" not in shown


def test_one_row_shows_every_metric_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {f"metric_{i}_us": float(i) for i in range(12)}
    print_table([Row(Status.ok, metrics=metrics, checks={"oracle": {"max_err": 0.25}}, notes=["padded"])])
    shown = capsys.readouterr().out
    for part in (*metrics, "check.oracle.max_err", "0.25", "padded", "ok"):
        assert part in shown


def test_one_row_has_a_ledger_in_one_line_and_names_what_it_leaves_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONSOLE, "width", 160)
    times = {"step_us": 7.0, "step_p10_us": 6.0, "step_p90_us": 8.0, "step_count": 5, "pass_p10_us": 3.0}
    parts = {"attention_us": 4.5, "combine_us": 0.0, "model_us": 2512.3, "sum_fraction": 0.99}
    ledger = {f"step_ledger_{part}": value for part, value in parts.items()}
    rest = {"timing_method": "events", "self_test_events_noop_us": 2.0, "self_test_span_us": 2.5}
    checks = {"logits_max_error": 0.25, "logits_relative_error": 0.125}
    print_table([Row(Status.ok, metrics=times | ledger | rest, checks=checks)])
    *table, last = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert table == [
        ["ok:", "step", "7", "us"],
        ["step_us", "7"],
        ["step_ledger", "attention", "4.5,", "model", "2,512"],
        ["check.logits_max_error", "0.25"],
    ]
    left_out = "*_p10_us, *_p90_us, *_count, timing_method, self_test_*, *_relative_error"
    assert " ".join(last) == f"also in the row: {left_out}"


def test_a_sweep_names_a_ledger_it_leaves_out_once(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "step_us",
        *(f"step_ledger_{part}_us" for part in ("attention", "model")),
        "pass_ledger_model_us",
    ]
    print_table([Row(Status.ok, config={"a": i}, metrics=dict.fromkeys(names, 1.5)) for i in range(2)])
    assert capsys.readouterr().out.splitlines()[-1] == "also in the rows: step_ledger_*, pass_ledger_*"


def test_quality_comes_first_and_what_explains_it_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONSOLE, "width", 160)
    names = [
        "perplexity",
        "scored_tokens",
        "oracle_bits_per_byte",
        "decode_step_us",
        "bits_per_byte",
        "top1_agreement",
    ]
    print_table([Row(Status.ok, config={"a": i}, metrics=dict.fromkeys(names, 1.5)) for i in range(2)])
    header = next(line for line in capsys.readouterr().out.splitlines() if "status" in line)
    expected = ["bits_per_byte", "top1_agreement", "decode_step_us", "perplexity", "scored_tokens"]
    assert header.split() == ["#", "a", "status", *expected, "oracle_bits_per_byte"]


def test_text_with_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row(Status.error, config={"a": i}, reasons=["sizes [bold]1, 2[/]"]) for i in range(2)]
    print_table(rows)
    assert "sizes [bold]1, 2[/]" in capsys.readouterr().out


def test_a_narrow_terminal_breaks_names_and_no_number_and_says_what_it_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONSOLE, "width", 80)
    metrics = {f"decode_{part}_us": 1234567.0 + i for i, part in enumerate(("step", "host", "kernel", "all"))}
    rows = [
        Row(
            Status.unsupported,
            config={"backend": {"name": name}, "kv": {"page_size": size}, "model": {"softcap": size}},
            metrics=metrics,
        )
        for name, size in (("torch", 1), ("triton", 256))
    ]
    print_table(rows)
    *table, last = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80
    for line in table[-3:-1]:  # the two rows, each in one line
        assert "unsupported" in line
        assert "1,234,567" in line
    assert "decode_" in "\n".join(table)
    left_out = last.removeprefix("also in the rows: ").split(", ")
    assert left_out == list(metrics)[-len(left_out) :]

    print_table(rows, metrics=["decode_all_us"])
    assert "1,234,570" in capsys.readouterr().out


def test_a_row_that_failed_shows_no_empty_check(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Row(Status.error, reasons=["too large"])])
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert shown == [["error:", "too", "large"]]


def test_what_several_rows_say_alike_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = ["no GPU", "no GPU", "torn", "no GPU", "no GPU", "no GPU"]
    print_table([Row(Status.unsupported, config={"a": i}, reasons=[text]) for i, text in enumerate(said)])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == ["#0-1 #3-5 unsupported: no GPU", "#2 unsupported: torn"]


def test_no_rows_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([])
    assert "no rows" in capsys.readouterr().out


def test_a_key_that_only_some_configs_have_varies() -> None:
    assert varying_keys([{"w": {"a": 1, "b": 2}}, {"w": {"a": 1}}, {"w": {"a": 1, "c": [1]}}]) == [
        "w.b",
        "w.c",
    ]
    assert varying_keys([{"w": 1}, {"w": 1}, {}]) == []


def test_what_comes_with_a_name_is_left_out_unless_it_varies_for_one_name() -> None:
    tiny, big = {"name": "tiny", "layers": 2, "heads": 4}, {"name": "big", "layers": 80, "heads": 64}
    assert varying_keys([{"model": tiny}, {"model": big}]) == ["model.name"]
    wide = tiny | {"heads": 8}
    assert varying_keys([{"model": tiny}, {"model": wide}, {"model": big}]) == ["model.name", "model.heads"]


def test_a_cell_that_failed_before_its_checkpoint_was_read_makes_no_size_vary() -> None:
    asked = {"path": "/a", "changed": None, "layers": 2, "softcap": 0.0}
    read = asked | {"changed": [], "layers": 32}
    assert varying_keys([{"model": read}, {"model": asked}]) == []
    assert varying_keys([{"model": read}, {"model": asked | {"path": "/b"}}]) == ["model.path"]
    assert varying_keys([{"model": asked}, {"model": asked | {"softcap": 30.0}}]) == ["model.softcap"]
    assert varying_keys([{"model": read}, {"model": read | {"softcap": 30.0}}]) == ["model.softcap"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "True"),
        (1234567, "1,234,567"),
        (0.000123456, "0.0001235"),
        (98765.4, "98,765"),
        (float("nan"), "nan"),
    ],
)
def test_values_are_short(value: object, shown: str) -> None:
    assert format_value(value) == shown


def test_a_row_begins_with_its_headline_in_the_units_of_a_reader() -> None:
    metrics = {
        "prefill_us": 198_978.0, "prefill_computed_tokens_per_s": 3216.2, "prefill_p10_us": 1.0,
        "decode_step_us": 18_125.0, "decode_step_tokens_per_s": 220.7, "metadata_us": 3.0,
    }  # fmt: skip
    said = "ok: prefill 199 ms (3,216 computed tokens/s), decode step 18.1 ms (220.7 tokens/s)"
    assert headline(Row(Status.ok, metrics=metrics)) == said
    assert headline(Row(Status.ok, metrics={"attention_us": 1234.0})) == "ok: attention 1.23 ms"
    assert headline(Row(Status.inaccurate, metrics=metrics, reasons=["far off"])) == "inaccurate: far off"
    text = {"ttft_us": 39_226.0, "decode_tokens_per_s": 35.27, "itl_us": 27_576.0}
    assert headline(Row(Status.ok, metrics=text)) == "ok: ttft 39.2 ms, decode 35.27 tokens/s"
    assert headline(Row(Status.ok, metrics={"ttft_us": 39_226.0})) == "ok: ttft 39.2 ms"


@pytest.mark.parametrize("count", [1, 2])
def test_no_line_in_a_pipe_ends_with_spaces(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row(Status.ok, config={"a": i}, metrics={"x_us": 1.0, "long_name_us": 2.0}, notes=["short", "y" * 60])
        for i in range(count)
    ]
    print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines and [line for line in lines if line != line.rstrip()] == []


def test_stages_are_lines_of_a_pipe_each_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with stages() as stage:
        stage("loading tiny")
        stage("timing")
    with stages(quiet=True) as stage:
        stage("not said in a sweep")
    with stages(enabled=False) as stage:
        stage("not said at all")
    assert caplog.messages == ["loading tiny", "timing"]
