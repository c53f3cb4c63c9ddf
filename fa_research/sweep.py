"""A sweep ends with a row for every cell: for those that raised, and for those that Hydra could not even compose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException

from fa_research.config import config_hash, to_plain
from fa_research.config.checkpoint import name_by_folder
from fa_research.config.explain import explain
from fa_research.errors import ConfigError

if TYPE_CHECKING:
    from fa_research.tracking import Row

log = logging.getLogger(__name__)


def pin_sweep_dir(config: DictConfig) -> None:
    """All cells go to one folder, also where they differ in a value that `hydra.sweep.dir` is made of, as `study`.

    Changes `config`, a sweep's own: each cell is composed from its overrides.
    """
    folder = str(config.hydra.sweep.dir).replace("'", "\\'")
    with flag_override(config, "readonly", False):
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")


class RowPerCellLauncher(Launcher):
    """Stands before another launcher and hands on the cells that can run and have not run yet.

    A cell that cannot be composed gets a row that says why. A cell whose row is complete is left alone, so that a sweep
    that was killed goes on where it stopped when it is started again with the same `hydra.sweep.dir`.
    """

    def __init__(self, launcher: Launcher, loader: ConfigLoader, config: DictConfig) -> None:
        self.launcher, self.loader, self.config = launcher, loader, config
        self.sweep_dir = Path(config.hydra.sweep.dir)

    def setup(self, **_: Any) -> None:
        """Nothing: the launcher behind is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises ConfigError if no cell can be composed: then the command line itself is wrong."""
        refused: dict[int, ConfigError] = {}
        wanted: list[int] = []
        for offset, overrides in enumerate(job_overrides):
            try:
                cfg = self.loader.load_sweep_config(self.config, list(overrides))
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                refused[offset] = ConfigError(explain(error))
            else:
                if cfg.hydra.sweeper.params != self.config.hydra.sweeper.params:
                    refused[offset] = ConfigError(_sweep_in_sweep(cfg, overrides))
                elif not self._is_complete(initial_job_idx + offset, cfg):
                    wanted.append(offset)
        if len(refused) == len(job_overrides):
            raise refused[0]
        for offset, refusal in refused.items():
            self._record(initial_job_idx + offset, job_overrides[offset], refusal)
        returns: list[JobReturn] = []
        for first, last in _runs(wanted):  # launchers number their jobs without gaps
            returns.extend(self.launcher.launch(job_overrides[first : last + 1], initial_job_idx + first))
        return returns

    def _record(self, job: int, overrides: Sequence[str], error: ConfigError) -> None:
        folder = self.sweep_dir / str(job)
        folder.mkdir(parents=True, exist_ok=True)
        log.warning("\t#%d : %s: %s", job, " ".join(overrides), error)
        record_failure(folder, error, self._as_asked(overrides), rows_before=count_rows(folder))

    def _as_asked(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The config of a cell that cannot be composed: what can be, with the rest set as it was typed."""
        cfg, kept, left = self.config, list[str](), list[str]()
        for override in sorted(
            overrides, key=lambda text: "." in text.partition("=")[0]
        ):  # groups before their keys
            try:
                cfg = self.loader.load_sweep_config(self.config, [*kept, override])
                kept.append(override)
            except (HydraException, OmegaConfBaseException, ValueError):
                left.append(override)
        plain = to_plain(cfg)
        for override in left:
            _set_typed(plain, override)
        return plain

    def _is_complete(self, job: int, cfg: DictConfig) -> bool:
        from fa_research.tracking import Status

        rows = _rows_of(self.sweep_dir / str(job))
        if not rows or rows[-1].status is Status.error or rows[-1].config_hash != config_hash(cfg):
            return False
        log.info("\t#%d has its row already", job)
        return True


def _sweep_in_sweep(cfg: DictConfig, overrides: Sequence[str]) -> str:
    preset = next((text for text in overrides if text.startswith("experiment=")), "this preset")
    return f"{preset} is a sweep of its own, over {', '.join(cfg.hydra.sweeper.params)}: run it by itself"


def _set_typed(plain: dict[str, Any], override: str) -> None:
    key, _, value = override.lstrip("+").partition("=")
    *path, last = key.split(".")
    node = plain
    for name in path:
        if not isinstance(child := node.setdefault(name, {}), dict):
            return  # a key below a plain value: nothing to show it under
        node = child
    if isinstance(group := node.get(last), dict):
        group["name"] = value  # the choice of a group
    else:
        node[last] = value


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch of consecutive numbers."""
    first = None
    for position, number in enumerate(numbers):
        first = number if first is None else first
        if position + 1 == len(numbers) or numbers[position + 1] != number + 1:
            yield first, number
            first = None


def count_rows(output_dir: Path) -> int:
    """Rows in this folder: of earlier attempts at the cell, or of another cell that had the folder before."""
    return len(_rows_of(output_dir))


def record_failure(
    output_dir: Path,
    error: Exception,
    cfg: DictConfig | dict[str, Any],
    *,
    rows_before: int,
    overrides: Sequence[str] = (),
) -> Row:
    """The row of a cell that raised, written to `output_dir` unless the cell has written its own: one more than the
    `rows_before` that were there when it began. `overrides` as for `config_hash`."""
    from fa_research.tracking import ROWS_FILE, RowWriter, environment, failed_row

    if len(written := _rows_of(output_dir)) > rows_before:
        return written[-1]
    row = failed_row(error)
    row.environment = environment()
    try:
        row.config, row.config_hash = to_plain(cfg), config_hash(cfg, overrides)
        name_by_folder(row.config)
    except OmegaConfBaseException as unresolved:
        row.notes.append(explain(unresolved))
    try:
        with RowWriter(output_dir / ROWS_FILE) as writer:
            writer.write(row)
    except OSError as unwritable:
        log.error("cannot write %s: %s", output_dir / ROWS_FILE, unwritable)
    return row


def gather(sweep_dir: Path) -> list[Row]:
    """The rows of all cells of a sweep in job order, written to its rows.jsonl too; a cell without a row is logged."""
    from fa_research.tracking import ROWS_FILE, RowWriter

    rows: list[Row] = []
    for folder in _cells(sweep_dir):
        found = _rows_of(folder)
        if not found:
            log.warning("%s has no row: its process ended before it could write one", folder)
        rows.extend(found[-1:])
    new = sweep_dir / (ROWS_FILE + ".new")
    new.unlink(missing_ok=True)
    with RowWriter(new) as writer:
        for row in rows:
            writer.write(row)
    new.replace(sweep_dir / ROWS_FILE)  # whole or not at all
    return rows


def _rows_of(folder: Path) -> list[Row]:
    from fa_research.tracking import ROWS_FILE, read_rows

    path = folder / ROWS_FILE
    return read_rows(path) if path.exists() else []


def _cells(sweep_dir: Path) -> list[Path]:
    """The folders of a sweep's cells, by job number where they have one."""
    folders = {path.parent for pattern in (".hydra", "rows.jsonl") for path in sweep_dir.rglob(pattern)} - {
        sweep_dir
    }
    numbered = {folder: int(folder.name) if folder.name.isdigit() else -1 for folder in folders}
    return sorted(folders, key=lambda folder: (numbered[folder], folder))
