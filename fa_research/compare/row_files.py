"""Which files hold rows, and the series beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa_research.errors import ConfigError
from fa_research.text import plural
from fa_research.tracking.wandb_mirror import SERIES_FILE

_MOST_NAMED = 5


def row_files(paths: Sequence[Path]) -> list[Path]:
    """Files as given; of folders every rows*.jsonl below them. Raises ConfigError where there is none."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist: give folders of results, or files as outputs/.../rows.jsonl"
            )
        files = [path] if path.is_file() else sorted(path.rglob("rows*.jsonl"))
        if not files:
            raise ConfigError(f"no rows.jsonl in {path} or below it{_other_files(path)}")
        found |= {file.resolve(): file for file in files}
    return list(found.values())


def _other_files(folder: Path) -> str:
    """Files that may hold rows under another name."""
    others = sorted(str(file) for file in folder.rglob("*.jsonl") if file.name != SERIES_FILE)
    if not others:
        return ""
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return f"; if these hold rows, give them by name: {', '.join(others[:_MOST_NAMED])}{more}"


def what_it_is(path: Path, torn: Sequence[str]) -> str:
    """Of a file without rows, why it has none: `is empty`, `is no text`, or what its first line lacks."""
    data = path.read_bytes()[:4096]
    if not data.strip():
        return "is empty"
    if b"\0" in data:
        return "is no text file"
    if path.suffix not in (".jsonl", ".json"):
        return f"is no JSON lines but {path.suffix or 'another kind of file'}"
    reason = torn[0].partition("skipped ")[2].strip("()") if torn else "no line holds anything"
    return f"has {plural(len(torn), 'line', 'lines')}, none of them a row (the first: {reason})"


def read_series(path: Path) -> list[tuple[str, list[Any]]]:
    """Names and values of series.jsonl; [] where there is none. Torn lines are left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            data = json.loads(line)
            found.append((str(data["name"]), list(data["values"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found
