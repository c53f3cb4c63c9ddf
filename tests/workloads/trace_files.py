"""Small traces in the published formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def mooncake(folder: Path, requests: Sequence[tuple[int, int, Sequence[int]]]) -> str:
    """A file of (prompt, answer, block ids) as Mooncake writes it, a request every 3 seconds."""
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = folder / "mooncake.jsonl"
    lines = [json.dumps(dict(zip(names, (3000 * i, *row), strict=True))) for i, row in enumerate(requests)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def azure(folder: Path, lens: Sequence[tuple[int, int]]) -> str:
    """A file of (prompt, answer) as Azure writes it."""
    rows = [f"2023-11-16 18:15:{i / 10:010.7f},{a},{b}" for i, (a, b) in enumerate(lens)]
    path = folder / "azure.csv"
    path.write_bytes((HEADER + "\n".join(rows)).replace("\n", "\r\n").encode())  # no line end, as published
    return str(path)
