"""W&B as a mirror of what is on disk: one run per cell, nothing is only there, and its failures never cost a row.

wandb is imported only when a run is really opened.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fa_research.config import Config, TrackingMode
from fa_research.tracking.failures import failed_row
from fa_research.tracking.records import Row, Status

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

SERIES_FILE = "series.jsonl"
_FAILED = frozenset({Status.error, Status.oom, Status.inaccurate})
# System sampling would disturb what is timed, and machine facts are in the row without naming the host.
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "init_timeout": 30,
    "finish_timeout": 60,
}


class WandbMirror:
    """What a cell talks to. Without a W&B run it only writes series to disk.

    Attributes:
        notes: what went wrong with W&B; `log_row` adds them to the row, so call it before the row is written.
    """

    def __init__(self, output_dir: Path, run: wandb.Run | None = None, notes: Sequence[str] = ()) -> None:
        self.output_dir = output_dir
        self.notes = list(notes)
        self.exit_code = 0
        self._run = run

    def log_series(
        self, name: str, step_metric: str, values: Sequence[float], steps: Sequence[float] | None = None
    ) -> None:
        """Values along an x-axis of their own, such as `decode/step_us` along `decode/step`.

        They go to series.jsonl first. `steps` are the x values, 0, 1, 2 ... where None.
        Raises ValueError if steps and values differ in number.
        """
        axis = list(range(len(values))) if steps is None else list(steps)
        points = [_finite(value) for value in values]
        if len(axis) != len(points):
            raise ValueError(f"series {name}: {len(axis)} steps for {len(points)} values")
        record = {"name": name, "step_metric": step_metric, "steps": axis, "values": points}
        with (self.output_dir / SERIES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self._mirror(lambda run: _log_points(run, name, step_metric, axis, values))

    def log_row(self, row: Row) -> None:
        """Mirror a finished row, and note in it what went wrong with W&B so far."""
        self.exit_code = 1 if row.status in _FAILED else 0
        self._mirror(lambda run: _log_row(run, row))
        row.notes.extend(note for note in self.notes if note not in row.notes)

    def finish(self, exit_code: int) -> None:
        """Close the run; a code other than 0 marks it as failed."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._failed("W&B did not finish the run", error)

    def _mirror(self, action: Callable[[wandb.Run], None]) -> None:
        """Whatever W&B raises, the cell goes on without it: the row on disk is what counts."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._failed("W&B failed and was closed, results on disk are complete", error)
            self.finish(exit_code=1)

    def _failed(self, what: str, error: Exception) -> None:
        self.notes.append(_note(what, error))
        log.warning(self.notes[-1])


@contextmanager
def wandb_run(
    config: Config,
    *,
    resolved: dict[str, Any],
    output_dir: Path,
    multirun: bool = False,
    config_hash: str = "",
) -> Iterator[WandbMirror]:
    """One W&B run for one cell, under `output_dir`/wandb; an exception from the body is mirrored as a failed row.

    Args:
        resolved: the config as plain data. W&B refuses OmegaConf's own types.
        multirun: group the run with the other cells of its sweep, else with the runs of its study.
    """
    mode = resolve_mode(config.tracking.mode)
    group = output_dir.parent.name if multirun else config.study
    name = "-".join(filter(None, (config.backend.name, config.workload.name, config_hash)))
    mirror = WandbMirror(output_dir)
    if mode is not TrackingMode.disabled:
        mirror = _open(config, mode, output_dir, {"config": resolved, "group": group, "name": name})
    try:
        yield mirror
    except Exception as error:
        mirror.log_row(failed_row(error, resolved, config_hash))
        mirror.finish(mirror.exit_code)
        raise
    except BaseException:  # interrupted
        mirror.finish(exit_code=1)
        raise
    mirror.finish(exit_code=mirror.exit_code)


def resolve_mode(mode: TrackingMode) -> TrackingMode:
    """What `auto` means here: WANDB_MODE if it is set, else online if a key is configured, else offline."""
    if mode is not TrackingMode.auto:
        return mode
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted in ("online", "offline", "disabled"):
        return TrackingMode[wanted]
    return TrackingMode.online if has_key() else TrackingMode.offline


def has_key() -> bool:
    """Whether a W&B key is in the environment or in netrc. Reads no more than whether it is there."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _open(config: Config, mode: TrackingMode, output_dir: Path, about: dict[str, Any]) -> WandbMirror:
    """A mirror in the wanted mode; where online fails offline, where that fails too without a run."""
    notes: list[str] = []
    attempts = [mode] if mode is TrackingMode.offline else [mode, TrackingMode.offline]
    for attempt in attempts:
        try:
            return WandbMirror(output_dir, _init(config, attempt, output_dir, about), notes)
        except Exception as error:
            instead = "without W&B" if attempt is attempts[-1] else "offline"
            notes.append(_note(f"W&B could not start a run in mode {attempt}, went on {instead}", error))
            log.warning(notes[-1])
    return WandbMirror(output_dir, None, notes)


def _init(config: Config, mode: TrackingMode, output_dir: Path, about: dict[str, Any]) -> wandb.Run:
    import wandb

    tracking = config.tracking
    return wandb.init(
        mode="online" if mode is TrackingMode.online else "offline",
        dir=output_dir,
        project=tracking.project,
        entity=tracking.entity,
        tags=[config.study, *tracking.tags],
        job_type=config.workload.name,
        reinit="finish_previous",
        settings=_SETTINGS,
        **about,
    )


def _log_points(
    run: wandb.Run, name: str, step_metric: str, axis: Sequence[float], values: Sequence[float]
) -> None:
    run.define_metric(step_metric, hidden=True)
    run.define_metric(name, step_metric=step_metric)
    for step, value in zip(axis, values, strict=True):
        run.log({step_metric: step, name: value})


def _log_row(run: wandb.Run, row: Row) -> None:
    run.config.update({"environment": row.environment, "config_hash": row.config_hash}, allow_val_change=True)
    run.log({f"metrics/{name}": value for name, value in row.metrics.items()})
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


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _note(what: str, error: BaseException) -> str:
    detail = " ".join(str(error).split())
    return f"{what}: {type(error).__name__}: {detail}"[:500]
