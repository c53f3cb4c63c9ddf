"""A sweep as one W&B run beside those of its cells: a table of all rows, lines, the report with its figures."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.keys import text_of
from fa_research.compare.overview import Sweep, read_sweep
from fa_research.compare.wandb_lines import lines_of
from fa_research.config import TrackingConfig, TrackingMode
from fa_research.tracking import ROWS_FILE
from fa_research.tracking.columns import DETAIL, main_metrics
from fa_research.tracking.wandb_runs import NAME_CHARS, open_run, resolve_mode, shortened

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

JOB_TYPE = "sweep"
_DATA = "WANDB_DATA_DIR"


def mirror_sweep(
    sweep_dir: Path, tracking: TrackingConfig, study: str, files: Sequence[Path] = ()
) -> str | None:
    """Mirror a finished sweep, in the group of its cells. What goes wrong with W&B is logged and costs nothing else.

    Args:
        files: what the report wrote: PNGs and one HTML page, or nothing.

    Returns:
        where the run is to be seen, None if it is offline or there is none: no W&B is wanted, it failed, or this
        sweep has a run already and no row is newer.

    Raises ConfigError if there is no row.
    """
    if resolve_mode(tracking.mode) is TrackingMode.disabled:
        return None
    sweep_dir = sweep_dir.absolute()
    sweep = read_sweep(sweep_dir)
    if _is_mirrored(sweep):
        return None
    group = _group_of_cells(sweep) or sweep_dir.name
    about = {"group": group, "name": f"sweep-{group}", "job_type": JOB_TYPE, "config": {"study": study}}
    with _data_below(sweep_dir):
        run, _ = open_run(tracking, sweep_dir, study=study, own_id=True, sweep_dir=sweep_dir, **about)
        if run is None:
            return None
        try:
            _log(run, sweep, files, study)
            run.finish()
        except Exception as error:
            log.warning("W&B failed, the sweep is complete on disk: %s: %s", type(error).__name__, error)
            run.finish(exit_code=1)
            return None
    return None if run.offline else run.url


def _group_of_cells(sweep: Sweep) -> str | None:
    found = Counter(record.row.wandb["group"] for record in sweep.records if "group" in record.row.wandb)
    return found.most_common(1)[0][0] if found else None


def _is_mirrored(sweep: Sweep) -> bool:
    made = [path.stat().st_mtime for path in (sweep.folder / "wandb").glob("*run-*")]
    rows = [datetime.fromisoformat(record.row.finished).timestamp() for record in sweep.records]
    return bool(made) and max(rows) < max(made)


@contextmanager
def _data_below(sweep_dir: Path) -> Iterator[None]:
    """What W&B copies of artifacts lies in the sweep's folder, not in the user's home, unless they said where."""
    own = _DATA not in os.environ
    if own:
        os.environ[_DATA] = str(sweep_dir / "wandb" / "data")
    try:
        yield
    finally:
        if own:
            del os.environ[_DATA]


def _log(run: wandb.Run, sweep: Sweep, files: Sequence[Path], study: str) -> None:
    """Lines first, each point at a step of its own; then what is there once."""
    import wandb

    for part in sweep.parts:
        if part.lines is not None:
            _log_lines(run, part.lines)
    run.log({"rows": _table(sweep)} | _media(files))
    counted = Counter(str(record.row.status) for record in sweep.records)
    run.summary.update({"cells": len(sweep.records)} | {f"cells_{k}": n for k, n in sorted(counted.items())})
    artifact = wandb.Artifact(
        _plain(shortened(f"rows-{study}", NAME_CHARS)), type="results", metadata=dict(counted)
    )
    for path in [sweep.folder / ROWS_FILE, *files]:
        if path.suffix != ".png" and path.is_file():
            artifact.add_file(str(path), name=path.name, skip_cache=True)
    run.log_artifact(artifact, aliases=["latest", _plain(shortened(sweep.folder.name, NAME_CHARS))])


def _log_lines(run: wandb.Run, comparison: Comparison) -> None:
    lines = lines_of(comparison)
    if lines is None:
        return
    run.define_metric(lines.axis, hidden=True)
    for names in lines.panels.values():
        for name in names:
            run.define_metric(name, step_metric=lines.axis, summary="none")
    for x, values in lines.points.items():
        run.log({lines.axis: x} | values)


def _table(sweep: Sweep) -> wandb.Table:
    """A line for each row: its place in the report, what was swept, how it ended, its main numbers, its own run."""
    import wandb

    metrics = [name for name in main_metrics([r.row for r in sweep.records]) if not DETAIL.search(name)]
    columns: list[str | int] = ["row", *sweep.keys, "status", *metrics, "config_hash", "run_id"]
    table = wandb.Table(columns=columns, allow_mixed_types=True)
    for number, record in enumerate(sweep.records):
        row = record.row
        swept = [_cell(record.config.get(key)) for key in sweep.keys]
        numbers = [row.metrics.get(name) for name in metrics]
        table.add_data(number, *swept, str(row.status), *numbers, record.hash, row.wandb.get("run_id"))
    return table


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else text_of(value)


def _media(files: Sequence[Path]) -> dict[str, Any]:
    """The report and its figures. W&B measures images with Pillow, which it does not bring itself."""
    import wandb

    shown: dict[str, Any] = {}
    for page in (path for path in files if path.suffix == ".html"):
        shown["report"] = wandb.Html(page, inject=False)
    figures = [path for path in files if path.suffix == ".png"]
    if figures and importlib.util.find_spec("PIL") is None:
        log.warning('W&B gets no figures without Pillow: pip install -e ".[report]"')
        return shown
    return shown | {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}


def _plain(text: str) -> str:
    """A name as W&B takes it for artifacts."""
    return re.sub(r"[^\w.-]", "_", text)
