"""Attention masks: one file each, found by name. A mask is a predicate (the oracle) and a `Band` (what kernels take).

A new mask is one new file in this folder that defines one frozen dataclass deriving from `Mask`.
"""

from __future__ import annotations

from functools import cache

from fa_research.discovery import discover
from fa_research.masks.base import Band, Mask
from fa_research.masks.causal import Causal
from fa_research.masks.chunked import Chunked
from fa_research.masks.full import Full
from fa_research.masks.sliding_window import SlidingWindow

__all__ = ["Band", "Causal", "Chunked", "Full", "Mask", "SlidingWindow", "build", "names"]


@cache
def _registry() -> dict[str, type[Mask]]:
    return discover(__name__, Mask)  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """Names that `build` accepts, sorted."""
    return tuple(sorted(_registry()))


def build(name: str, size: int | None = None) -> Mask:
    """The mask called `name`; `size` (tokens) is for masks that have one. Raises ValueError with the choices."""
    cls = _registry().get(name)
    if cls is None:
        raise ValueError(f"mask name={name!r} is unknown; choose one of {', '.join(names())}")
    takes_size = "size" in cls.__dataclass_fields__
    if takes_size and size is None:
        raise ValueError(f"mask name={name} needs size (tokens), for instance size=1024")
    if not takes_size and size is not None:
        raise ValueError(f"mask name={name} takes no size, got size={size}")
    return cls(size) if takes_size else cls()  # type: ignore[call-arg]
