"""A model over a paged cache: extend passes. Decode steps are in `decode.py`.

Legend: T query tokens, B requests, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fa_research.attention.layer import Attend, PagedAttention
from fa_research.backends import AttentionBackend
from fa_research.batch import ForwardBatch, extend_batch
from fa_research.errors import ConfigError
from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.phases import METADATA, MODEL, mark

Observe = Callable[[ForwardBatch, Tensor], object]  # an extend pass's batch and hidden states [T, E]


class EngineModel(Protocol):
    """What the engine needs of a model. `notes` are for the row: what differs from the config."""

    notes: list[str]

    def __call__(self, input_ids_T: Tensor, attend: Attend, rows_M: Tensor | None = None) -> Tensor:
        """Hidden states [T, E], or [M, E] of the tokens `rows_M`."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Logits [*, vocabulary], or None where there is no head (the attention path alone)."""
        ...


@dataclass(slots=True)
class ModelRunner:
    """Model, backend and cache of one device."""

    model: EngineModel
    backend: AttentionBackend
    cache: PagedKVCache

    @property
    def req_to_token_RW(self) -> Tensor:
        return self.cache.req_to_token.req_to_token

    def forward(self, batch: ForwardBatch, rows_M: Tensor | None = None) -> Tensor:
        """Hidden states [T, E] (or of the tokens `rows_M`) of a batch whose metadata the backend has built."""
        attend = PagedAttention(self.backend, self.cache.kv, batch, self.backend.lowerings)
        with mark(MODEL):
            return self.model(batch.input_ids_T, attend, rows_M)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Logits [*, vocabulary] of hidden states, or None where there is no head."""
        with mark(MODEL):
            return self.model.compute_logits(hidden)

    def prepare_extend(
        self, requests: Sequence[CachedRequest], new_tokens: Sequence[Sequence[int] | Tensor]
    ) -> ForwardBatch:
        """Reserve slots for the new tokens and make their batch. Raises KVCacheFull, or ConfigError for a request
        without new tokens or past the context limit; then nothing has changed."""
        _refuse_empty(new_tokens)
        prefix_lens = [request.seq_len for request in requests]
        with mark(METADATA):
            self.cache.extend(requests, [len(tokens) for tokens in new_tokens])
            return extend_batch(self.req_to_token_RW, [r.row for r in requests], prefix_lens, new_tokens)

    @torch.inference_mode()
    def extend_pass(self, batch: ForwardBatch, observe: Observe | None = None) -> Tensor | None:
        """One EXTEND or MIXED pass: metadata, model, logits [B, vocabulary] of each request's last token. `observe`
        gets the hidden states of all tokens, which are computed for it alone."""
        with mark(METADATA):
            metadata = self.backend.init_forward_metadata(batch, self.req_to_token_RW)
            last_B = metadata.cu_seqlens_q_B1[1:].long() - 1
        if observe is None:
            return self.compute_logits(self.forward(batch, last_B))
        hidden_TE = self.forward(batch)
        observe(batch, hidden_TE)
        return self.compute_logits(hidden_TE[last_B])

    def extend(
        self,
        requests: Sequence[CachedRequest],
        new_tokens: Sequence[Sequence[int] | Tensor],
        observe: Observe | None = None,
    ) -> Tensor | None:
        """Extend each request by its new tokens; logits [B, vocabulary] of the last ones."""
        return self.extend_pass(self.prepare_extend(requests, new_tokens), observe)

    def extend_in_chunks(
        self,
        requests: Sequence[CachedRequest],
        new_tokens: Sequence[Sequence[int]],
        chunk_size: int,
        observe: Observe | None = None,
    ) -> Tensor | None:
        """Chunked prefill: passes of at most `chunk_size` tokens of each request, while any has tokens left.
        Logits [B, vocabulary] of every request's last token. `observe` as in `extend_pass`."""
        _refuse_empty(new_tokens)
        last: dict[int, Tensor] = {}
        for start in range(0, max(map(len, new_tokens)), chunk_size):
            active = [i for i, tokens in enumerate(new_tokens) if len(tokens) > start]
            pieces = [new_tokens[i][start : start + chunk_size] for i in active]
            logits = self.extend([requests[i] for i in active], pieces, observe)
            if logits is not None:
                last |= dict(zip(active, logits, strict=True))
        return torch.stack([last[i] for i in range(len(requests))]) if last else None


def _refuse_empty(new_tokens: Sequence[Sequence[int] | Tensor]) -> None:
    lens = [len(tokens) for tokens in new_tokens]
    if not lens or min(lens) < 1:
        raise ConfigError(f"every request of an extend pass needs at least one new token, got lengths {lens}")
