"""Workloads: one file each, found by name."""

from __future__ import annotations

from functools import cache

from fa_research.config import Config
from fa_research.discovery import discover, plugins
from fa_research.errors import ConfigError
from fa_research.workloads.base import Workload

__all__ = ["Workload", "create", "names"]


@cache
def _registry() -> dict[str, type[Workload]]:
    return discover(__name__, Workload, plugins())  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """All workloads, sorted."""
    return tuple(sorted(_registry()))


def create(config: Config) -> Workload:
    """The workload that `config.workload.name` names. Raises ConfigError for an unknown name."""
    cls = _registry().get(config.workload.name)
    if cls is None:
        raise ConfigError(
            f"workload.name={config.workload.name} is unknown; choose one of {', '.join(names())}"
        )
    return cls(config)
