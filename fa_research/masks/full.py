"""Bidirectional attention (encoders, image tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa_research.masks.base import Band, Mask


@dataclass(frozen=True)
class Full(Mask):
    """Every key of the request, later ones too."""

    name: ClassVar[str] = "full"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos >= 0) & (q_pos >= 0)

    def band(self) -> Band:
        return Band(causal=False)
