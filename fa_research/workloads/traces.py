"""Request traces of production services: how long prompts and answers are, and which prompts begin alike.

Two published formats are read, told apart by content: the CSV of the Azure LLM inference traces (2023 and 2024; Patel
et al., "Splitwise", ISCA 2024) and the JSON lines of Mooncake (Qin et al., FAST 2025). Nothing here touches torch.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

from fa_research.errors import ConfigError

BLOCK_SIZE = 512  # tokens that a Mooncake hash id stands for
MAX_LENGTH = 10_000_000  # tokens: a longer request is a mistake in the file
FORMATS = (
    "a CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces, "
    "https://github.com/Azure/AzurePublicDataset) or JSON lines with timestamp, input_length, output_length and "
    "hash_ids (Mooncake, https://github.com/kvcache-ai/Mooncake, FAST25-release/traces)"
)
_CSV_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_JSON_COLUMNS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `arrival` is in seconds, from any origin: it orders requests and does nothing else. `blocks` are ids
    of the prompt's whole blocks of `BLOCK_SIZE` tokens; an id stands for all of the prompt up to its block's end."""

    arrival: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...] = ()

    @property
    def final_length(self) -> int:
        return self.input_length + self.output_length

    def cut(self, max_length: int) -> TraceRequest:
        """At most `max_length` tokens: the prompt loses its end, and an answer that fills all of it is cut too."""
        output_length = min(self.output_length, max_length - 1)
        input_length = min(self.input_length, max_length - output_length)
        return replace(
            self,
            input_length=input_length,
            output_length=output_length,
            blocks=self.blocks[: input_length // BLOCK_SIZE],
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and what the row should say of how they were read."""

    requests: list[TraceRequest]
    notes: list[str] = field(default_factory=list)


def read_trace(path: str | None, count: int, max_length: int) -> Trace:
    """The first `count` requests of the file, each of at most `max_length` tokens.

    Raises:
        ConfigError: no path, a file that is missing or of neither format, or a line that is wrong (named as file:line).
    """
    if path is None:
        raise ConfigError(f"workload.path is not set: give a trace of requests, {FORMATS}")
    file = Path(path).expanduser()
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(islice(_rows(file, lines), count))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"workload.path={path} cannot be read: {reason}; give {FORMATS}") from error
    if not rows:
        raise ConfigError(f"workload.path={path} holds no request; give {FORMATS}")
    ordered = sorted(rows, key=lambda row: row.arrival)
    requests = [row if row.final_length <= max_length else row.cut(max_length) for row in ordered]
    notes = [f"trace: {len(rows)} requests of {file.name}"]
    if len(rows) < count:
        notes.append(f"trace: workload.requests={count}, the file has {len(rows)}")
    if late := sum(b.arrival < a.arrival for a, b in zip(rows, rows[1:], strict=False)):
        notes.append(f"trace: {late} rows came before the row above them; sorted by time")
    if shortened := sum(a is not b for a, b in zip(ordered, requests, strict=True)):
        notes.append(
            f"trace: {shortened} requests above {max_length} tokens were cut to that, at the prompt's end"
        )
    return Trace(requests, notes)


def _rows(file: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    """The requests of either format, in the order of the file; blank lines count as lines and as nothing else."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip().startswith("{"):
        yield from _json_rows(file, first, numbered)
        return
    names = [name.strip() for name in next(csv.reader([first[1]]))]
    if missing := [name for name in _CSV_COLUMNS if name not in names]:
        raise ConfigError(f"{file}:{first[0]}: no column {', '.join(missing)}; give {FORMATS}")
    for number, line in numbered:
        cells = next(csv.reader([line]))
        if len(cells) != len(names):
            _fail(file, number, f"{len(cells)} columns, the first line names {len(names)} (a torn line?)")
        arrival, *lengths = (dict(zip(names, cells, strict=True))[name] for name in _CSV_COLUMNS)
        prompt, answer = (
            _length(file, number, name, value, least)
            for name, value, least in zip(_CSV_COLUMNS[1:], lengths, (1, 0), strict=True)
        )
        yield TraceRequest(_time(file, number, arrival), prompt, answer)


def _json_rows(
    file: Path, first: tuple[int, str], numbered: Iterator[tuple[int, str]]
) -> Iterator[TraceRequest]:
    before: dict[int, int | None] = {}  # block id -> the block in front of it, the same wherever it stands
    for number, line in chain([first], numbered):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            _fail(file, number, f"no JSON ({error.msg} at column {error.colno}; a torn line?)")
        if not isinstance(row, dict) or (missing := [name for name in _JSON_COLUMNS if name not in row]):
            _fail(file, number, f"no {', '.join(missing) if isinstance(row, dict) else 'JSON object'}")
        prompt = _length(file, number, "input_length", row["input_length"], 1)
        answer = _length(file, number, "output_length", row["output_length"], 0)
        blocks = _blocks(file, number, row["hash_ids"], prompt, before)
        yield TraceRequest(_time(file, number, row["timestamp"], 1e-3), prompt, answer, blocks)


def _blocks(file: Path, number: int, ids: Any, prompt: int, before: dict[int, int | None]) -> tuple[int, ...]:
    """The ids of the prompt's whole blocks, the last id left out where its block is not whole."""
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        _fail(file, number, f"hash_ids={str(ids)[:40]}: must be a list of whole numbers")
    if len(ids) != (blocks := -(-prompt // BLOCK_SIZE)):
        _fail(
            file,
            number,
            f"{len(ids)} hash_ids, input_length={prompt} has {blocks} blocks of {BLOCK_SIZE} tokens",
        )
    for block, previous in zip(ids, [None, *ids], strict=False):
        if before.setdefault(block, previous) != previous:
            _fail(
                file,
                number,
                f"hash id {block} follows another block than before; ids must stand for prefixes",
            )
    return tuple(ids[: prompt // BLOCK_SIZE])


def _length(file: Path, number: int, name: str, value: Any, least: int) -> int:
    try:
        length = int(value) if isinstance(value, str) else value
    except ValueError:
        length = None
    if type(length) is not int or not least <= length <= MAX_LENGTH:
        _fail(
            file, number, f"{name}={value!r}: must be a whole number of tokens from {least} to {MAX_LENGTH}"
        )
    return length


def _time(file: Path, number: int, value: Any, unit: float = 1.0) -> float:
    """Seconds, of a number in `unit` seconds or of a date and time (UTC unless it says otherwise)."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value) * unit
        moment = datetime.fromisoformat(value.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (AttributeError, OverflowError, ValueError):
        _fail(file, number, f"timestamp {value!r}: must be a date and time, or a number in JSON lines")


def _fail(file: Path, number: int, problem: str) -> NoReturn:
    raise ConfigError(f"{file}:{number}: {problem}")
