"""Answers from rows: which choice is faster where, by how much and how surely. No torch; no altair until a figure."""

from __future__ import annotations

from fa_research.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
