"""Folders of results as runs leave them, with rows whose differences are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from fa_research.config import DecodeWorkload, config_hash, to_plain
from fa_research.config.schemas import BackendConfig, Config, KVConfig
from fa_research.tracking import ROWS_FILE, Row, RowWriter, Status

H200 = {"gpu": "NVIDIA H200", "gpu_driver": "580", "python": "3.12.3", "packages": {"torch": "2.11.0"}}
METRIC = "decode_step_us"


def config_of(
    backend: str = "fa3", context: int = 1024, batch: int = 1, page: int = 1, **backend_keys: Any
) -> dict:
    """A decode cell's resolved config."""
    workload = DecodeWorkload(batch_size=batch, context_len=context)
    return to_plain(
        Config(
            backend=BackendConfig(name=backend, **backend_keys),
            kv=KVConfig(page_size=page),
            workload=workload,
        )
    )


def noisy(center: float, *, spread: float = 0.01, count: int = 32, seed: int = 0) -> list[float]:
    """Samples around `center`, their median exactly there."""
    drawn = np.random.default_rng(seed).normal(0.0, spread, count)
    return list(center * np.exp(drawn - np.median(drawn)))


def row_of(
    config: dict[str, Any],
    samples: Sequence[float] = (),
    *,
    status: Status = Status.ok,
    environment: dict[str, Any] | None = None,
    finished: str = "2026-01-01T00:00:00.000+00:00",
    **metrics: Any,
) -> Row:
    """A row with the columns that timing these samples makes."""
    if samples:
        deciles = quantiles(samples, n=10, method="inclusive")
        metrics = {
            METRIC: median(samples),
            "decode_step_p10_us": deciles[0],
            "decode_step_p90_us": deciles[-1],
            "decode_step_count": len(samples),
            "decode_step_tokens_per_s": 1e6 / median(samples),
        } | metrics
    facts = H200 if environment is None else environment
    return Row(
        status, config, config_hash(config), metrics, environment=facts, started=finished, finished=finished,
        reasons=[] if status is Status.ok else [f"a reason to be {status}"],
    )  # fmt: skip


def write_rows(path: Path, *rows: Row) -> Path:
    """Rows alone, as a published study keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path


def write_sweep(folder: Path, *cells: tuple[Row, Sequence[float]]) -> Path:
    """A sweep's folder: a numbered folder for each cell with its series, and all rows gathered at the top."""
    for number, (row, samples) in enumerate(cells):
        write_rows(folder / str(number) / ROWS_FILE, row)
        if samples:
            write_series(folder / str(number), samples)
    write_rows(folder / ROWS_FILE, *(row for row, _ in cells))
    return folder


def write_series(folder: Path, samples: Sequence[float], name: str = f"series/{METRIC}") -> None:
    with (folder / "series.jsonl").open("a") as file:
        record = {"name": name, "step_metric": "series/sample", "steps": list(range(len(samples)))}
        file.write(json.dumps(record | {"values": list(samples)}) + "\n")


def sweep(folder: Path, times: dict[tuple[str, int], float], **config: Any) -> Path:
    """A sweep over (backend, context) whose medians are `times`, in microseconds."""
    cells = []
    for seed, ((backend, context), center) in enumerate(times.items()):
        samples = noisy(center, seed=seed)
        cells.append((row_of(config_of(backend, context, **config), samples), samples))
    return write_sweep(folder, *cells)
