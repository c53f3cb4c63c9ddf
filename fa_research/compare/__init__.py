"""Answers from rows: which choice is faster where, by how much and how surely. No torch; no altair until a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa_research.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, so that the command line answers to Ctrl-C before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fa_research.compare import comparison

    return getattr(comparison, name)
