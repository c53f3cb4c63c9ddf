"""Readers of traces: both formats, and every line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa_research.errors import ConfigError
from fa_research.workloads.traces import TraceRequest, read_trace
from tests.workloads.trace_files import HEADER, mooncake

START = "2023-11-16 18:15:46.6805900"


def test_both_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    csv = tmp_path / "trace.jsonl"
    csv.write_text(
        f"\ufeffGeneratedTokens, TIMESTAMP,ContextTokens\n5,2024-05-10 00:00:00.009930+00:00,7\n\n6,{START},8\n"
    )
    trace = read_trace(str(csv), 9, 100)
    assert [(r.input_length, r.output_length, r.blocks) for r in trace.requests] == [(8, 6, ()), (7, 5, ())]
    assert any("1 rows came before the row above them" in note for note in trace.notes)
    assert any("workload.requests=9, the file has 2" in note for note in trace.notes)
    trace = read_trace(mooncake(tmp_path, [(1030, 0, [4, 5, 6]), (512, 3, [4])]), 1, 4000)
    assert trace.requests == [TraceRequest(0.0, 1030, 0, (4, 5))]


def test_long_requests_are_cut_at_the_prompts_end(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path, [(1030, 20, [4, 5, 6]), (512, 3, [4]), (9, 900, [7])]), 3, 600)
    lens = [(r.input_length, r.output_length, r.blocks) for r in trace.requests]
    assert lens == [(580, 20, (4,)), (512, 3, (4,)), (1, 599, ())]
    assert any("2 requests above 600 tokens were cut" in note for note in trace.notes)


GOOD = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEADER + f"{START},10,5\n{START},1", 3, "2 columns, the first line names 3"),
        (HEADER + f"{START},-10,5\n", 2, "ContextTokens='-10'"),
        (HEADER + f"{START},0,5\n", 2, "ContextTokens='0'"),
        (HEADER + f"{START},10,1e3\n", 2, "GeneratedTokens='1e3'"),
        (HEADER + f"{START},99999999999,5\n", 2, "from 1 to 10000000"),
        (HEADER + "noon,10,5\n", 2, "timestamp 'noon'"),
        ("TIMESTAMP,ContextTokens\n", 1, "no column GeneratedTokens"),
        ("prose that is no trace\n", 1, "no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        (GOOD + GOOD[:40], 2, "no JSON"),
        (GOOD + "[1]\n", 2, "no JSON object"),
        (GOOD.replace('"output_length": 5, ', ""), 1, "no output_length"),
        (GOOD.replace("600", "-600"), 1, "input_length=-600"),
        (GOOD.replace("600", "true"), 1, "input_length=True"),
        (GOOD.replace("[1, 2]", "[1]"), 1, "1 hash_ids, input_length=600 has 2 blocks"),
        (GOOD.replace("[1, 2]", '["a", "b"]'), 1, "must be a list of whole numbers"),
        (GOOD.replace("0,", "null,", 1), 1, "timestamp None"),
        (GOOD + GOOD.replace("0,", "NaN,", 1), 2, "timestamp nan"),
        (GOOD + GOOD.replace("[1, 2]", "[3, 2]"), 2, "hash id 2 follows another block"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_trace(str(path), 100, 1000)
    assert f"{path}:{line}: " in str(error.value) and message in str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(HEADER)
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (None, "workload.path is not set"),
        (str(empty), "holds no request"),
        (str(binary), "not UTF-8"),
        (str(tmp_path), "cannot be read"),
        (str(tmp_path / "none"), "No such file"),
    ):
        with pytest.raises(ConfigError) as error:
            read_trace(path, 1, 10)
        assert message in str(error.value)
        assert all(where in str(error.value) for where in ("AzurePublicDataset", "kvcache-ai/Mooncake"))
