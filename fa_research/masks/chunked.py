"""Chunked local attention (Llama 4's `attention_chunk_size`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa_research.masks.base import Band, Mask


@dataclass(frozen=True)
class Chunked(Mask):
    """Keys of the query's own chunk of `size` tokens, up to the query. Chunks start at multiples of `size`.
    Raises ValueError for a size below 1."""

    size: int
    name: ClassVar[str] = "chunked"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"mask name=chunked needs size >= 1 token, got size={self.size}")

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & (k_pos >= q_pos // self.size * self.size)

    def band(self) -> Band:
        return Band(causal=True, chunk=self.size)
