"""The contract of a backend, on one page.

A new backend is one file in this folder with one subclass, and one YAML in `configs/backend/`. It writes
`unavailable`, `capabilities`, `attend`, and, if it must, `plan`. Everything else (metadata, rewrites,
CUDA-graph state) is here. The verbs are SGLang's.

Legend: T query tokens, H query heads, K KV heads, D head dim, V value head dim, N slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.local import chunk_metadata
from fa_research.attention.lowering import Lowering, lower
from fa_research.attention.merge import apply_sinks
from fa_research.backends.contract import checked
from fa_research.backends.graph_state import CudaGraphState
from fa_research.batch import ForwardBatch
from fa_research.errors import ConfigError
from fa_research.metadata import FlashAttentionMetadata, fill_metadata
from fa_research.phases import HOST_PLAN, METADATA, mark
from fa_research.spec import AttentionSpec, Capabilities


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """What a backend is made for. `dtype` is that of queries, new keys and values; `kv_dtype` that of the cache (None:
    the same); lengths are in tokens.
    `num_splits` 0 leaves the split of the keys to the kernel; `deterministic` asks that a request's result be
    bitwise independent of its neighbours; `metadata_per_layer` that each layer has metadata and plans made for it
    alone; `options` are the backend's own."""

    device: torch.device
    dtype: torch.dtype
    page_size: int
    max_context_len: int
    provider: str | None = None
    kv_dtype: torch.dtype | None = None
    num_splits: int = 0
    deterministic: bool = False
    metadata_per_layer: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class AttentionBackend(ABC):
    """One way to run attention over the paged cache. Instances serve one model on one device."""

    name: ClassVar[str]
    option_names: ClassVar[frozenset[str]] = frozenset()
    takes_provider: ClassVar[bool] = False  # whether several packages offer its kernels
    # Parts of the names of the kernels that join split results, for the step-cost ledger.
    combine_kernels: ClassVar[tuple[str, ...]] = ()
    reads_cu_seqlens_k: ClassVar[bool] = False  # JAX's calls have none at hand

    def __init_subclass__(cls) -> None:
        """Raises TypeError for a backend that was written for the contract before `AttentionCall`."""
        old = {"attend_into", "forward_decode", "forward_extend"} & vars(cls).keys()
        try:
            signature(cls.attend).bind("self", "call")
        except TypeError:
            old.add("attend")
        if old:
            raise TypeError(
                f"{cls.__name__}.{min(old)}: backends implement attend(self, call), where call is an AttentionCall "
                "(fa_research/attention/call.py) and call.metadata.q_len tells decode steps; see README, Add a backend"
            )

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        unknown = set(settings.options) - self.option_names
        if unknown:
            choices = ", ".join(sorted(self.option_names)) or "none"
            raise ConfigError(
                f"backend.options.{min(unknown)} is unknown to backend={self.name}; its options: {choices}"
            )
        if settings.provider is not None and not self.takes_provider:
            raise ConfigError(
                f"backend.provider={settings.provider}: backend={self.name} has kernels of its own; leave it out"
            )
        self.settings = settings
        self.lowerings: tuple[Lowering, ...] = tuple(self.lower(spec) for spec in specs)
        self._plan_phase = HOST_PLAN if self.capabilities.host_planning else METADATA
        self.forward_metadata: FlashAttentionMetadata | None = None
        self._renew: Callable[[], object] | None = None  # makes the metadata of the pass at hand once more
        self._unread = False  # whether it was made and no layer has read it
        self._chunked: dict[int, FlashAttentionMetadata] = {}

    # What a backend writes.

    @classmethod
    @abstractmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        """Every reason why this machine cannot run it (missing package, GPU too old); empty if it can."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it does natively here."""

    @property
    def provider(self) -> str | None:
        """The package that the kernels came from, for the row."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What it chose where `backend.options` leave it open, for the row."""
        return ()

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:  # noqa: B027 (a hook)
        """Work once per forward pass for one kind of layer; keep the result in
        `metadata.plans[lowering.spec]`. It runs on the device, inside a captured graph, unless
        `capabilities.host_planning`: then before each replay, with the lengths in `metadata.seq_lens_cpu` and
        buffers whose addresses stay in `metadata.kept`."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> AttentionOutput:
        """Attention of one layer over the cache, with what `plan` left in `call.metadata.plans`."""

    # What a backend has.

    def lower(self, spec: AttentionSpec) -> Lowering:
        """How this backend runs the spec; `lowering.reasons` is non-empty where it cannot."""
        s = self.settings
        return lower(
            spec,
            self.capabilities,
            page_size=s.page_size,
            dtype=s.dtype,
            device=s.device,
            kv_dtype=s.kv_dtype,
        )

    def init_forward_metadata(self, batch: ForwardBatch, req_to_token_RW: Tensor) -> FlashAttentionMetadata:
        """Once per eager pass, before the layers: allocate, fill, plan."""
        page_size = self.settings.page_size
        metadata = FlashAttentionMetadata.allocate(
            batch.batch_size, batch.max_seq_len_k, page_size, req_to_token_RW.device
        )
        fill_metadata(metadata, batch, req_to_token_RW, page_size)
        self._renew = partial(self.init_forward_metadata, batch, req_to_token_RW)
        return self._set(metadata, batch)

    def init_cuda_graph_state(self, max_batch_size: int, max_seq_len_k: int) -> CudaGraphState:
        """The static metadata of the captured steps of one decode runner. The runner owns it: it hands it to the two
        below, and keeps it as long as its graphs, which read it."""
        page_size, device = self.settings.page_size, self.settings.device
        return CudaGraphState(
            FlashAttentionMetadata.allocate(max_batch_size, max_seq_len_k, page_size, device)
        )

    def init_forward_metadata_capture_cuda_graph(
        self, batch: ForwardBatch, req_to_token_RW: Tensor, state: CudaGraphState
    ) -> FlashAttentionMetadata:
        """The same as `init_forward_metadata` on the static buffers. It runs while the graph is captured, so
        that every replay fills and plans anew on the device."""
        metadata = state.of_batch(batch.batch_size)
        fill_metadata(metadata, batch, req_to_token_RW, self.settings.page_size)
        self._renew = partial(self.init_forward_metadata_capture_cuda_graph, batch, req_to_token_RW, state)
        return self._set(metadata, batch, state)

    def init_forward_metadata_replay_cuda_graph(
        self, batch: ForwardBatch, req_to_token_RW: Tensor, state: CudaGraphState
    ) -> None:
        """Before a replay of a backend with `capabilities.host_planning`: the same, outside the graph, with
        the host's lengths in `batch.seq_lens_cpu`. Other backends have all of it in the graph."""
        self.init_forward_metadata_capture_cuda_graph(batch, req_to_token_RW, state)

    def forward(
        self,
        q_THD: Tensor,
        k_cache_NKD: Tensor,
        v_cache_NKV: Tensor,
        lowering: Lowering,
        *,
        sinks_H: Tensor | None = None,
        return_lse: bool = False,
    ) -> AttentionOutput:
        """One layer's attention with the metadata of this pass, or, with `settings.metadata_per_layer`, with metadata
        made by the same call anew: for every kind of layer, as a pass makes them. A pass without requests has an empty
        result, and no backend is asked for it. Raises BackendFault where the result has another shape, dtype or device
        than expected."""
        if self.settings.metadata_per_layer and not self._unread and self._renew is not None:
            with mark(METADATA):
                self._renew()
        self._unread = False
        if not q_THD.shape[0]:
            shape, device = (0, lowering.spec.num_heads), q_THD.device
            lse_TH = torch.empty(shape, dtype=torch.float32, device=device) if return_lse else None
            return q_THD.new_empty(*shape, lowering.spec.v_head_dim), lse_TH
        metadata = self._chunked[lowering.chunk] if lowering.chunk else self.forward_metadata
        assert metadata is not None, "init_forward_metadata comes first"
        call = AttentionCall(
            aligned(q_THD), k_cache_NKD, v_cache_NKV, metadata, lowering.spec, sinks_H, return_lse
        )
        return checked(self.attend(call), call, self.name)

    def _set(
        self, metadata: FlashAttentionMetadata, batch: ForwardBatch, state: CudaGraphState | None = None
    ) -> FlashAttentionMetadata:
        self.forward_metadata, self._unread = metadata, True
        if not metadata.batch_size:
            return metadata  # nothing to plan; `forward` answers by itself
        chunks = {lowering.chunk for lowering in self.lowerings if lowering.chunk}
        self._chunked = {chunk: chunk_metadata(metadata, batch, chunk) for chunk in chunks}
        if state is not None:
            self._chunked = {chunk: state.keep(chunk, derived) for chunk, derived in self._chunked.items()}
        with mark(self._plan_phase):
            for lowering in dict.fromkeys(self.lowerings):
                self.plan(self._chunked[lowering.chunk] if lowering.chunk else metadata, lowering)
        return metadata


ALIGNMENT = 16  # bytes; what TMA and 16-byte loads of kernels ask of addresses and strides


def aligned(q_THD: Tensor) -> Tensor:
    """The queries, copied where their head dim is not contiguous, or where their rows or heads do not begin on
    multiples of 16 bytes. FA3's TMA destroys the CUDA context over such a view."""
    token, head, dim = q_THD.stride()
    size = q_THD.element_size()
    if dim == 1 and not (q_THD.data_ptr() | token * size | head * size) % ALIGNMENT:
        return q_THD
    return q_THD.clone(memory_format=torch.contiguous_format)


def sinks_afterwards(backend: AttentionBackend, call: AttentionCall) -> AttentionOutput:
    """A call with sinks of a kernel that has them, where the kernel's own cannot be used: its LSE holds the sink and
    ours does not, and sinks of another dtype would be rounded."""
    assert call.sinks_H is not None
    out, lse = backend.attend(replace(call, sinks_H=None, return_lse=True))
    assert lse is not None
    return apply_sinks(out, lse, call.sinks_H), lse if call.return_lse else None
