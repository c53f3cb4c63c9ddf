"""Sliding-window attention (Mistral, Gemma, gpt-oss)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa_research.masks.base import Band, Mask


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """The last `size` keys up to the query, the query's own among them (transformers' `sliding_window`).
    Raises ValueError for a size below 1."""

    size: int
    name: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"mask name=sliding_window needs size >= 1 token, got size={self.size}")

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & (k_pos > q_pos - self.size)

    def band(self) -> Band:
        return Band(causal=True, window=self.size)
