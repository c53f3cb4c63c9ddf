"""Hydra finds plugins in this package only. What the sweeper does is in fa_research.sweep."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class FaResearchSweeper(BasicSweeper):
    """Hydra's basic sweeper with a launcher in front of the chosen one that gives every cell a row."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from fa_research.sweep import RowPerCellLauncher, pin_sweep_dir

        pin_sweep_dir(config)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        assert self.launcher is not None
        self.launcher = RowPerCellLauncher(
            self.launcher, hydra_context, task_function, config, self.max_batch_size
        )
        self.max_batch_size = None  # whether a command is wrong shows in all of its cells

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: the launcher composes every cell first."""
