"""A sweep ends with a row for every cell: for those that raised, and for those that Hydra could not even compose."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from fa_research import plugins
from fa_research.config import load_config
from fa_research.config.free_text import quotes
from fa_research.config.load import without_hydra
from fa_research.errors import CellLost, ConfigError
from fa_research.sweep import exclude
from fa_research.sweep.cells import Cell, Composer
from fa_research.sweep.lifeline import is_here, prepare_environment
from fa_research.sweep.outcome import begin, request_stop, rows_by_hash, stop_requested
from fa_research.sweep.stale import StaleRows
from fa_research.sweep.view import SweepView, watching
from fa_research.tracking import Row
from fa_research.tracking.cell_rows import count_rows, record_failure, rows_of, write_row

log = logging.getLogger(__name__)

_BASIC = "BasicLauncher"  # by name: Hydra loads its plugins a second time, so that there are two such classes
_MANY = 10  # cells


def _of_all(cells: Sequence[Cell]) -> ConfigError | None:
    """What every cell would fail of, if that is the same for all: the command is wrong, and no cell need start."""
    first = None
    for cell in cells:
        problem = _problem(cell)
        if problem is None or (first is not None and str(first) != str(problem)):
            return None
        first = problem
    return first


def _problem(cell: Cell) -> ConfigError | None:
    """What is wrong with a cell, as far as its config alone tells. None too where the check itself breaks: the cell
    meets the same exception and has a row with it."""
    if cell.error is not None or cell.cfg is None:
        return cell.error
    try:
        load_config(without_hydra(cell.cfg), cell.cfg.hydra.overrides.task)
    except ConfigError as error:
        return error
    except Exception:
        log.debug("the check of cell %d broke", cell.job, exc_info=True)
    return None


def pin_sweep_dir(config: DictConfig) -> None:
    """All cells go to one folder, also where they differ in a value that `hydra.sweep.dir` is made of, as `study`.

    Changes `config`, a sweep's own: each cell is composed from its overrides.
    """
    folder = quotes(str(config.hydra.sweep.dir))
    with flag_override(config, "readonly", False):
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")


class RowPerCellLauncher(Launcher):
    """Stands before another launcher and hands on the cells that can run and have not run yet.

    A cell that cannot be composed gets a row that says why. A cell whose config has a row in the sweep's folder is left
    alone, so that a sweep that was killed goes on where it stopped when it is started again with the same
    `hydra.sweep.dir`, and one that was changed or extended runs only what is new. If the code of a row has changed
    since, its cell is run again, unless `sweep.keep_stale` is set.

    It is given all cells at once, and hands them to a launcher of other processes by `batch_size` (None: all).
    """

    def __init__(
        self,
        launcher: Launcher,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"hydra.sweeper.max_batch_size={batch_size}: must be at least 1, or null")
        self.batch_size = batch_size
        self.launcher, self.context, self.task, self.config = launcher, context, task, config
        self.sweep_dir = Path(config.hydra.sweep.dir)
        self.fail_fast = bool(config.sweep.fail_fast)
        self.outcome = begin(self.sweep_dir)

    def setup(self, **_: Any) -> None:
        """Nothing: the launcher behind is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises ConfigError if no cell can be composed, if `sweep.exclude` leaves none, if two share a folder, or if a
        plugin cannot be imported: the command is wrong."""
        cells = self._compose(job_overrides, initial_job_idx)
        if all(cell.error for cell in cells):
            assert cells[0].error is not None
            raise cells[0].error
        if problem := _of_all(cells):
            raise problem
        cells = self._without_excluded(cells)
        self._check_folders(cells)
        self.outcome.folders |= {cell.job: self._folder(cell) for cell in cells}
        wanted = self._without_rows(cells)
        if wanted and (self._in_this_process or is_here(self.launcher)):
            plugins.check_apart()
        for cell in cells:
            if cell.error is not None:
                self._refuse(cell, cell.error)
        log.info("%d of %d cells to run, into %s", len(wanted), len(cells), self.sweep_dir)
        if stop_requested(self.sweep_dir):
            self.outcome.not_run += [cell.job for cell in wanted]
        elif self._in_this_process:
            self._run_here(wanted)
        elif wanted:
            self._hand_on(wanted)
        return []  # what cells return is in the outcome: the sweeper would only look for exceptions

    def _compose(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Cell]:
        """All cells. Many take as long as the imports of the process that will run them, so those begin meanwhile."""
        composer = Composer(self.context.config_loader, self.config)
        cells = [composer.compose(first, job_overrides[0])]
        new = cells[0].error is None and not any(self.sweep_dir.glob("*/rows.jsonl"))
        if new and len(job_overrides) >= _MANY and self._in_this_process and self.config.sweep.isolate:
            from fa_research.isolation import prepare

            prepare(self.config.device)
        cells += [composer.compose(first + i, job_overrides[i]) for i in range(1, len(job_overrides))]
        shared = frozenset.intersection(*(frozenset(cell.overrides) for cell in cells))
        for cell in cells:
            cell.shared = shared
        return cells

    @property
    def _in_this_process(self) -> bool:
        return type(self.launcher).__name__ == _BASIC

    def _without_excluded(self, cells: list[Cell]) -> list[Cell]:
        exclusions = exclude.parse(self.config.sweep.exclude)
        composed = [cell for cell in cells if cell.error is None]
        for text in exclude.check(exclusions, composed):
            log.warning("sweep.exclude: %r matches no cell of this sweep", text)
        out = {cell.job for cell in composed if any(entry.matches(cell) for entry in exclusions)}
        if len(out) == len(cells):
            raise ConfigError(
                f"sweep.exclude={list(self.config.sweep.exclude)} leaves out every cell of the sweep"
            )
        if out:
            log.info("sweep.exclude leaves out %d of %d cells", len(out), len(cells))
        return [cell for cell in cells if cell.job not in out]

    def _check_folders(self, cells: list[Cell]) -> None:
        first: dict[str, int] = {}
        for cell in cells:
            if (other := first.setdefault(cell.subdir, cell.job)) != cell.job:
                sweep: Any = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
                raise ConfigError(
                    f"hydra.sweep.subdir={sweep['subdir']}: cells #{other} and #{cell.job} would share the folder "
                    f"{cell.subdir}; put ${{hydra.job.num}} into it"
                )

    def _without_rows(self, cells: list[Cell]) -> list[Cell]:
        """The composed cells that have to be run: those without a row, and those whose row was made by code that has
        changed since. A row that lies in another cell's folder is copied to this cell's."""
        known = rows_by_hash(self.sweep_dir)
        stale = StaleRows(keep=bool(self.config.sweep.keep_stale))
        wanted = []
        for cell in cells:
            if cell.error is not None:
                continue
            row = known.get(cell.hash)
            if row is None or stale.is_to_be_replaced(cell.job, row):
                wanted.append(cell)
                continue
            log.info("\t#%d has its row already", cell.job)
            if [last.to_json() for last in rows_of(self._folder(cell))[-1:]] != [row.to_json()]:
                write_row(self._folder(cell), row)
        stale.say()
        return wanted

    def _folder(self, cell: Cell) -> Path:
        return self.sweep_dir / cell.subdir

    def _refuse(self, cell: Cell, error: ConfigError) -> None:
        folder = self._folder(cell)
        log.warning("\t#%d : %s: %s", cell.job, cell.text, error)
        self._note(cell, record_failure(folder, error, cell.plain, rows_before=count_rows(folder)))
        if self.fail_fast:
            request_stop(self.sweep_dir)

    def _run_here(self, cells: list[Cell]) -> None:
        """What Hydra's basic launcher does, without composing each cell once more; a cell that Hydra cannot run, as on
        a full disk, is the only one that is lost."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        with SweepView(len(cells), self.config.tracking.progress) as view:
            for cell in cells:
                if stop_requested(self.sweep_dir):
                    self.outcome.not_run.append(cell.job)
                    continue
                view.begin(cell)
                row = self._run(cell)
                self._note(cell, row)
                if row is not None:
                    view.end(cell, row)

    def _run(self, cell: Cell) -> Row | None:
        assert cell.cfg is not None
        cfg, cell.cfg = cell.cfg, None  # composed configs of a long sweep are not kept
        before = count_rows(self._folder(cell))
        try:
            done = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=cfg,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            row: Row | None = done.return_value
        except OSError as error:
            row = record_failure(self._folder(cell), error, cell.plain, rows_before=before)
        finally:
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return row

    def _hand_on(self, cells: list[Cell]) -> None:
        """All at once to a launcher that may run them side by side. Launchers number their jobs without gaps, so each
        cell is told its folder."""
        before = [count_rows(self._folder(cell)) for cell in cells]
        begun = [self._begun(cell) for cell in cells]
        prepare_environment(self.launcher)
        try:
            with watching(cells, self._folder):
                rows = [row for batch in self._batches(cells) for row in self._launch(batch)]
        except Exception as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            if begun == [self._begun(cell) for cell in cells]:
                raise ConfigError(self._cannot_launch(said)) from error
            log.exception("the launcher failed")
            lost = CellLost([f"the launcher lost it: {said}"])
            rows = [
                record_failure(self._folder(cell), lost, cell.plain, rows_before=count)
                for cell, count in zip(cells, before, strict=True)
            ]
        for cell, row in zip(cells, rows, strict=True):
            self._note(cell, row)

    def _begun(self, cell: Cell) -> int | None:
        """When it last began: Hydra writes this file before the cell runs."""
        try:
            return (self._folder(cell) / ".hydra" / "overrides.yaml").stat().st_mtime_ns
        except OSError:
            return None

    def _cannot_launch(self, reason: str) -> str:
        name = self.config.hydra.runtime.choices["hydra/launcher"]
        return (
            f"hydra/launcher={name}: it ran no cell: {reason}; put right what it says (its keys are "
            "hydra.launcher.*), or take hydra/launcher=basic, which runs the cells here, one after another"
        )

    def _batches(self, cells: list[Cell]) -> list[list[Cell]]:
        size = self.batch_size or len(cells)
        return [cells[i : i + size] for i in range(0, len(cells), size)]

    def _launch(self, cells: list[Cell]) -> list[Row | None]:
        jobs = [[*cell.overrides, f"hydra.sweep.subdir={quotes(cell.subdir)}"] for cell in cells]
        return [done.return_value for done in self.launcher.launch(jobs, cells[0].job)]

    def _note(self, cell: Cell, row: Row | None) -> None:
        """Keep of a cell what its folder does not tell."""
        if row is None:
            self.outcome.not_run.append(cell.job)
        elif row.to_json() not in [kept.to_json() for kept in rows_of(self._folder(cell))[-1:]]:
            self.outcome.unwritten[cell.job] = row
