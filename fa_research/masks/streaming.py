"""The first tokens and a window (StreamingLLM, Xiao et al. 2023: attention sinks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa_research.masks.base import Mask


@dataclass(frozen=True)
class Streaming(Mask):
    """The first `sink_tokens` keys, and the last `size` keys up to the query, the query's own among them. Positions
    stay those of the text; StreamingLLM counts them anew within its cache. Raises ValueError for a size below 1 or
    `sink_tokens` below 0."""

    size: int
    sink_tokens: int = 4
    name: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"mask name=streaming needs size >= 1 token, got size={self.size}")
        if self.sink_tokens < 0:
            raise ValueError(
                f"mask name=streaming needs sink_tokens >= 0, got sink_tokens={self.sink_tokens}"
            )

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & ((k_pos < self.sink_tokens) | (k_pos > q_pos - self.size))

    def band(self) -> None:
        return None
