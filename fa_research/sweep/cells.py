"""The cells of a sweep, composed once: what they would measure, or why they cannot even be composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from fa_research.config import config_hash, to_plain
from fa_research.config.explain import explain
from fa_research.errors import ConfigError


@dataclass(eq=False)
class Cell:
    """One cell. `plain` is its config as plain data; what cannot be composed is there as it was typed, with `error`.

    Attributes:
        subdir: its folder in the sweep's: `hydra.sweep.subdir`, the number of its job where nothing else is asked for.
        shared: overrides that all cells of the sweep have.
    """

    job: int
    overrides: list[str]
    plain: dict[str, Any]
    cfg: DictConfig | None = None
    error: ConfigError | None = None
    choices: dict[str, str] = field(default_factory=dict)
    subdir: str = ""
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.subdir = self.subdir or str(self.job)

    @cached_property
    def hash(self) -> str:
        """As in the cell's row."""
        typed = list(self.cfg.hydra.overrides.task) if self.cfg is not None else self.overrides
        return config_hash(self.plain, typed)

    @property
    def text(self) -> str:
        """Its own overrides on one line: those that other cells of the sweep lack; all where there are none."""
        typed = [text for text in self.overrides if not text.startswith("hydra.")]
        return " ".join([text for text in typed if text not in self.shared] or typed)


class Composer:
    """Composes cells from a sweep's own config and the overrides of each."""

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self.loader, self.config = loader, config

    def compose(self, job: int, overrides: Sequence[str]) -> Cell:
        """A cell, with an error where this cell is none."""
        try:
            cfg = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = job
            plain, subdir = to_plain(cfg), str(cfg.hydra.sweep.subdir)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            refusal = ConfigError(explain(error))
            return Cell(job, list(overrides), self._as_asked(overrides), error=refusal)
        if cfg.hydra.sweeper.params != self.config.hydra.sweeper.params:
            refusal = ConfigError(_sweep_in_sweep(cfg, overrides))
            return Cell(job, list(overrides), self._as_asked(overrides), error=refusal)
        return Cell(job, list(overrides), plain, cfg, choices=dict(cfg.hydra.runtime.choices), subdir=subdir)

    def _as_asked(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The config of a cell that cannot be composed: what can be, with the rest set as it was typed."""
        plain, kept, left = to_plain(self.config), list[str](), list[str]()
        for override in sorted(
            overrides, key=lambda text: "." in text.partition("=")[0]
        ):  # groups before their keys
            try:
                plain = to_plain(self.loader.load_sweep_config(self.config, [*kept, override]))
                kept.append(override)
            except (HydraException, OmegaConfBaseException, ValueError):
                left.append(override)
        for override in left:
            _set_typed(plain, override)
        return plain


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
