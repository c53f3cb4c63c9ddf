"""What captured steps read between replays: metadata at addresses that stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fa_research.metadata import FlashAttentionMetadata


@dataclass(slots=True)
class CudaGraphState:
    """The static metadata of one decode runner, for every batch size that it captures.

    metadata: of the largest batch; smaller ones use its head. Graphs read these tensors, so the state lives as long as
    they do, and each runner has its own."""

    metadata: FlashAttentionMetadata
    _kept: dict[int, dict[Any, Any]] = field(default_factory=dict)
    _chunked: dict[tuple[int, int], FlashAttentionMetadata] = field(default_factory=dict)

    def of_batch(self, batch_size: int) -> FlashAttentionMetadata:
        """The head for this batch size, with what the backend keeps for it."""
        metadata = self.metadata.head(batch_size)
        metadata.kept = self._kept.setdefault(batch_size, {})
        return metadata

    def keep(self, chunk: int, derived: FlashAttentionMetadata) -> FlashAttentionMetadata:
        """The virtual requests of a batch, in the tensors that its first pass made: a replay reads those."""
        kept = self._chunked.setdefault((derived.batch_size, chunk), derived)
        if kept is not derived:
            kept.copy_(derived)
        elif kept.kept is None:
            kept.kept = {}
        return kept
