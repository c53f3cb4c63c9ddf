"""What W&B gets of a row and of a series: summaries, histograms, an artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_research.tracking.columns import flat
from fa_research.tracking.records import Row

if TYPE_CHECKING:
    import wandb

ROW_FILE = "row.json"


def log_points(
    run: wandb.Run, name: str, step_metric: str, axis: Sequence[float], values: Sequence[float]
) -> None:
    """A line along an x-axis of its own, with the least, the mean and the largest value as columns."""
    run.define_metric(step_metric, hidden=True)
    run.define_metric(name, step_metric=step_metric, summary="min,mean,max")
    for step, value in zip(axis, values, strict=True):
        run.log({step_metric: step, name: value})


def log_row(run: wandb.Run, row: Row) -> None:
    """Metrics and histograms of their samples, the rest as columns, and the row itself as an artifact."""
    config = {"environment": row.environment, "config_hash": row.config_hash} | _locked(run, row.config)
    run.config.update(config, allow_val_change=True)
    run.log({f"metrics/{name}": value for name, value in row.metrics.items()} | _histograms(row))
    if row.generated:
        run.summary.update({"generated": dict(row.generated)})
    run.summary.update(
        {
            "status": str(row.status),
            "checks": json.loads(row.to_json())["checks"],
            "reasons": "; ".join(row.reasons),
            "notes": "; ".join(row.notes),
        }
    )
    _log_artifact(run, row)


def _histograms(row: Row) -> dict[str, Any]:
    import wandb

    finite = {name: [v for v in values if math.isfinite(v)] for name, values in row.samples.items()}
    return {f"samples/{name}": wandb.Histogram(values) for name, values in finite.items() if values}


def _locked(run: wandb.Run, config: dict[str, Any]) -> dict[str, Any]:
    """The groups that a W&B agent has chosen, with dotted keys: W&B keeps the choice in the place of the group."""
    return flat(
        {k: v for k, v in config.items() if isinstance(v, dict) and isinstance(run.config.get(k), str)}
    )


def _log_artifact(run: wandb.Run, row: Row) -> None:
    """The row as JSON; every measurement of a config is a version of one artifact."""
    import wandb

    path = Path(run.dir) / ROW_FILE
    path.write_text(row.to_json() + "\n", encoding="utf-8")
    artifact = wandb.Artifact(
        f"row-{row.config_hash or run.id}", type="row", metadata={"status": str(row.status)}
    )
    # immutable: W&B makes no copy of the file outside of the run's folder
    artifact.add_file(str(path), name=ROW_FILE, policy="immutable", skip_cache=True)
    run.log_artifact(artifact)
