"""What a model layer calls: rotate and write K/V, then attend (SGLang's `RadixAttention`).

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, X rope table length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fa_research.attention.call import AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.attention.merge import apply_sinks
from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.kv_cache import TokenToKVPool
from fa_research.phases import ATTENTION, KV_WRITE, mark


class Attend(Protocol):
    """The face that models see."""

    def __call__(
        self,
        layer_id: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        *,
        rope: Tensor | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor: ...


class LayerBackend(Protocol):
    """The face of a backend that a layer needs."""

    def forward(
        self,
        q_THD: Tensor,
        k_cache_NKD: Tensor,
        v_cache_NKV: Tensor,
        lowering: Lowering,
        *,
        sinks_H: Tensor | None,
        return_lse: bool,
    ) -> AttentionOutput: ...


class PagedAttention:
    """One forward pass's attention over the paged cache: callable as `Attend`. The backend's metadata for `batch` must
    have been built; it serves every layer."""

    def __init__(
        self, backend: LayerBackend, kv: TokenToKVPool, batch: ForwardBatch, lowerings: Sequence[Lowering]
    ) -> None:
        self._backend = backend
        self._kv = kv
        self._batch = batch
        self._lowerings = lowerings

    def __call__(
        self,
        layer_id: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        *,
        rope: Tensor | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Output [T, H, V] in the query's dtype. `q_THD` is rotated in place when there is a rope table
        (float32 [X, D], cosines then sines)."""
        with mark(KV_WRITE):
            self.write(layer_id, q_THD, k_TKD, v_TKV, rope)
        with mark(ATTENTION):
            return self.read(layer_id, q_THD, sinks_H)

    @property
    def mode(self) -> ForwardMode:
        """That of the batch."""
        return self._batch.mode

    def write(self, layer_id: int, q_THD: Tensor, k_TKD: Tensor, v_TKV: Tensor, rope: Tensor | None) -> None:
        """The KV write (and the rotation) alone."""
        batch = self._batch
        if rope is None:
            self._kv.write(layer_id, k_TKD, v_TKV, batch.out_cache_loc_T)
        else:
            args = (rope, batch.positions_T, batch.out_cache_loc_T)
            self._kv.rope_and_write(layer_id, q_THD, k_TKD, v_TKV, *args)

    def read(self, layer_id: int, q_THD: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        """The attention alone, over what the cache holds."""
        lowering = self._lowerings[layer_id]
        out, lse = self._backend.forward(
            q_THD,
            self._kv.k(layer_id),
            self._kv.v(layer_id),
            lowering,
            sinks_H=None if lowering.sink_epilogue else sinks_H,
            return_lse=lowering.sink_epilogue,
        )
        if lowering.sink_epilogue:
            assert lse is not None and sinks_H is not None
            out = apply_sinks(out, lse, sinks_H)
        return out
