"""The mask of a decoder: a query sees itself and what came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa_research.masks.base import Band, Mask


@dataclass(frozen=True)
class Causal(Mask):
    """Every key up to the query."""

    name: ClassVar[str] = "causal"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return k_pos <= q_pos

    def band(self) -> Band:
        return Band(causal=True)
