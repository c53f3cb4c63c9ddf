"""Attention masks: one file each, found by name. A mask is a predicate (the oracle) and a `Band` (what kernels take).

A new mask is one frozen dataclass that derives from `Mask`, in a file of this folder or in a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from fa_research.discovery import discover, plugins
from fa_research.errors import ConfigError
from fa_research.masks.base import Band, Mask
from fa_research.masks.causal import Causal
from fa_research.masks.chunked import Chunked
from fa_research.masks.fields import arguments, problem
from fa_research.masks.full import Full
from fa_research.masks.sliding_window import SlidingWindow
from fa_research.masks.streaming import Streaming

__all__ = ["Band", "Causal", "Chunked", "Full", "Mask", "SlidingWindow", "Streaming", "build", "names"]


@cache
def _own() -> dict[str, type[Mask]]:
    return discover(__name__, Mask)  # type: ignore[type-abstract]


@cache
def _registry() -> dict[str, type[Mask]]:
    found = discover(__name__, Mask, plugins())  # type: ignore[type-abstract]
    if wrong := next(filter(None, map(problem, found.values())), None):
        raise ConfigError(wrong)
    return found


def names() -> tuple[str, ...]:
    """Names that `build` accepts, sorted; imports plugins."""
    return tuple(sorted(_registry()))


def build(name: str, size: int | None = None, options: Mapping[str, Any] | None = None) -> Mask:
    """The mask called `name`; `size` (tokens) is for masks that have one, `options` are its other fields. Raises
    ValueError, in one line, for an unknown name or field, a field that is missing, or one of another type."""
    cls = _own().get(name) or _registry().get(name)  # plugins may import torch: only where one is asked for
    if cls is None:
        raise ValueError(f"mask name={name!r} is unknown; choose one of {', '.join(names())}")
    return cls(**arguments(cls, size, options or {}))
