"""W&B as a mirror of what is on disk: one run per cell, nothing is only there, and its failures never cost a row.

wandb is imported only when a run is really opened.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_research.config import Config
from fa_research.tracking.failures import failed_row
from fa_research.tracking.records import Row, Status
from fa_research.tracking.wandb_offline import go_offline, sweep_of
from fa_research.tracking.wandb_row import log_points, log_row
from fa_research.tracking.wandb_runs import agents_sweep, note, open_run, place_of

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

SERIES_FILE = "series.jsonl"
_FAILED = frozenset({Status.error, Status.oom, Status.inaccurate})


class WandbMirror:
    """What a cell talks to. Without a W&B run it only writes series to disk.

    Attributes:
        notes: what went wrong with W&B; `log_row` adds them to the row, so call it before the row is written.
    """

    def __init__(
        self,
        output_dir: Path,
        run: wandb.Run | None = None,
        notes: Sequence[str] = (),
        sweep_dir: Path | None = None,
    ) -> None:
        self.output_dir, self.sweep_dir = output_dir, sweep_dir
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
        self._mirror(lambda run: log_points(run, name, step_metric, axis, values))

    def log_row(self, row: Row) -> None:
        """Mirror a finished row, and note in it where its run is and what went wrong with W&B so far."""
        if self._run is not None:
            row.wandb = place_of(self._run)
        self.exit_code = 1 if row.status in _FAILED else 0
        self._mirror(lambda run: log_row(run, row))
        row.notes.extend(text for text in self.notes if text not in row.notes)

    def finish(self, exit_code: int) -> None:
        """Close the run; a code other than 0 marks it as failed."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._failed("W&B did not finish the run", error)
            if (
                self.sweep_dir is not None and not run.offline
            ):  # a minute's wait, which the next cells need not repeat
                go_offline(self.sweep_dir, self.notes[-1])

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
        self.notes.append(note(what, error))
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
        multirun: group the run with the other cells of its sweep, else with those of the W&B sweep whose agent started
            this process, else with the runs of its study.
    """
    name = "-".join(filter(None, (config.backend.name, config.workload.name, config_hash)))
    sweep_dir = sweep_of(output_dir) if multirun else None
    run, notes = open_run(
        config.tracking,
        output_dir,
        study=config.study,
        own_id=multirun,
        sweep_dir=sweep_dir,
        config=resolved,
        group=sweep_dir.name if sweep_dir else agents_sweep() or config.study,
        name=name,
        job_type=config.workload.name,
    )
    mirror = WandbMirror(output_dir, run, notes, sweep_dir)
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


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
