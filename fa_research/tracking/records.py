"""One measured cell is one row, and one row is one line of strict JSON, on disk before the next cell starts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROWS_FILE = "rows.jsonl"


class Status(Enum):
    """How a cell ended. Only `ok` and `suspect` rows may carry times."""

    ok = "ok"
    unsupported = "unsupported"  # the backend refused; `reasons` says why
    oom = "oom"
    inaccurate = "inaccurate"  # failed the oracle, so it was not timed
    suspect = "suspect"  # timed, but not to be believed before a second look; `reasons` says why
    error = "error"

    def __str__(self) -> str:
        return self.value


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Row:
    """One cell of an ablation.

    Attributes:
        config: the resolved config as plain data.
        config_hash: eight hex digits, see `fa_research.config.config_hash`.
        metrics: numbers with their units in their names, such as `decode_step_us` or `kv_pool_bytes`.
        samples: for metrics in microseconds that are medians, by their names, every sample.
        checks: what was compared with the oracle: errors, tolerances, verdicts.
        generated: where the model wrote text, the `prompt` and the `text` that follows it.
        notes: anything a reader of the row should know.
        reasons: why the cell is not `ok`.
        wandb: where the W&B run that mirrors the row is: `entity`, `project`, `group`, `run_id`; empty without one.
        started, finished: ISO 8601, UTC.
    """

    status: Status
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    wandb: dict[str, str] = field(default_factory=dict)
    started: str = field(default_factory=now)
    finished: str = field(default_factory=now)

    def to_json(self) -> str:
        """One line of strict JSON; NaN and infinities become the strings "nan", "inf" and "-inf"."""
        return json.dumps(_jsonable(dataclasses.asdict(self)), allow_nan=False, separators=(", ", ": "))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of one line; metrics that were not finite are floats again. Keys unknown here are dropped.

        Raises ValueError that says what is wrong with a line that is no row.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        if (status := known.pop("status", None)) not in [status.value for status in Status]:
            raise ValueError(f"its status is {json.dumps(status)}, not one of {', '.join(map(str, Status))}")
        empty = cls(Status(status))
        for name, value in known.items():
            if type(value) is not (kind := type(getattr(empty, name))):
                raise ValueError(f"its {name} is {json.dumps(value)[:40]}, not {_IN_JSON[kind]}")
        row = dataclasses.replace(empty, **known)
        row.metrics = {key: _number(value) for key, value in row.metrics.items()}
        row.samples = {key: _number(value) for key, value in row.samples.items()}
        return row


_IN_JSON: dict[type, str] = {dict: "an object", list: "a list", str: "text"}


def _number(value: Any) -> Any:
    """Numbers as `to_json` writes them, also in a list; everything else as it is."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _jsonable(value: Any) -> Any:
    """Plain data: numpy and torch scalars as numbers, enums by value, paths and the rest as text."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return _jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


class RowWriter:
    """Appends rows to a file; each is on disk when `write` returns, so a killed run keeps what it had.

    Raises:
        OSError: the file cannot be created or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not path.exists()
        self._file = path.open("ab")
        if is_new:
            _fsync_folder(path.parent)
        elif _lacks_newline(path):
            self._file.write(b"\n")  # a torn line of a killed run must not swallow the next row

    def write(self, row: Row) -> None:
        # One write call for the whole line: what a kill leaves behind is at most one torn line, the last.
        self._file.write(row.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lacks_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _fsync_folder(folder: Path) -> None:
    """A new file's name is on disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. A line that is no row (torn by a kill) is skipped with a warning that names it."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> list[tuple[int, Row]]:
    """The same, each row with the number of its line, from 1."""
    rows, torn = rows_and_torn(path)
    for line in torn:
        warnings.warn(line, stacklevel=2)
    return rows


def rows_and_torn(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    """The same, and what there is to say of lines that are no rows."""
    rows, torn = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, Row.from_json(line)))
            continue
        except json.JSONDecodeError as error:
            said = f"no JSON, as where a run was killed: {error.msg}, column {error.colno} of {len(line)}"
        except ValueError as error:
            said = str(error)
        torn.append(f"{path}:{number} is not a row and was skipped ({said})")
    return rows, torn
