"""Decode steps: one token for every request, costing the host one graph launch.

Everything the step does on the device is in the graph: advancing lengths and positions, finding slots, metadata, model,
sampling. The host reserves pages ahead, every few steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fa_research.backends import CudaGraphState
from fa_research.batch import ForwardBatch
from fa_research.config import GraphMode
from fa_research.config.limits import require
from fa_research.engine.cuda_graph import GraphSet
from fa_research.engine.decode_state import DecodeState
from fa_research.engine.model_runner import ModelRunner
from fa_research.engine.sampling import GREEDY, SamplingParams
from fa_research.engine.token_reader import TokenReader
from fa_research.errors import ConfigError, KVCacheFull
from fa_research.kernels import ops
from fa_research.kv_cache import CachedRequest
from fa_research.phases import METADATA, SAMPLING, mark


class DecodeRunner:
    """Decoding of a fixed batch of requests.

    mode: `on` captures a CUDA graph for each of `batch_sizes`; `simulate` runs the same padded static-buffer path
    without capture; `off` runs the exact batch eagerly. A batch above the largest size runs eagerly; `ran_eagerly` says
    so. max_seq_len_k: the longest context (tokens) that a captured step may reach. sampling: steps can draw tokens at
    random. If False, only argmax is captured.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        mode: GraphMode,
        batch_sizes: Sequence[int],
        max_seq_len_k: int,
        reserve_ahead: int,
        sampling: bool = False,
    ) -> None:
        if mode is GraphMode.auto:
            raise ConfigError("cuda_graph.mode=auto: give a DecodeRunner what resolve_graph_mode makes of it")
        if mode is not GraphMode.off:
            require({"number of cuda_graph.batch_sizes": len(batch_sizes), "max_seq_len_k": max_seq_len_k})
        require({f"cuda_graph.batch_sizes[{i}]": size for i, size in enumerate(batch_sizes)})
        require({"kv.reserve_ahead": reserve_ahead})
        self.runner = runner
        self.mode = mode
        self.batch_sizes = sorted(batch_sizes) if mode is not GraphMode.off else []
        self.max_seq_len_k = max_seq_len_k
        self.sampling = sampling
        self._padded_logits: Tensor | None = None
        self._reserve_ahead = reserve_ahead
        self._requests: list[CachedRequest] = []
        self._steps_reserved = 0
        self._steps_unrecorded = 0
        self._padded_size = 0
        self._plans_on_host = runner.backend.capabilities.host_planning
        device = runner.req_to_token_RW.device
        self._static = DecodeState(max(self.batch_sizes, default=1), device)
        self._state = self._static
        self.reader = TokenReader(0, device)
        self._sampled_B = self._static.input_ids_B[:0]
        self.graphs: GraphSet | None = None
        self.graph_state: CudaGraphState | None = None  # this runner's own: another's steps leave it alone
        if self.batch_sizes:
            self.graph_state = runner.backend.init_cuda_graph_state(max(self.batch_sizes), max_seq_len_k)
        if mode is GraphMode.on:
            self.graphs = self._capture()

    @property
    def logits_BX(self) -> Tensor | None:
        """The last step's logits [B, vocabulary], overwritten by the next; None before the first and without a head."""
        return None if self._padded_logits is None else self._padded_logits[: len(self._requests)]

    @property
    def ran_eagerly(self) -> bool:
        """True when the batch at hand does not go through the static-buffer path."""
        return self._padded_size == 0

    @property
    def padded_size(self) -> int:
        """Entries in the batch that runs, padding included."""
        return self._padded_size or len(self._requests)

    @property
    def state(self) -> DecodeState:
        """The buffers of the batch at hand."""
        return self._state

    def start(
        self,
        requests: Sequence[CachedRequest],
        last_tokens: Sequence[int] | Tensor,
        sampling: Sequence[SamplingParams] | None = None,
    ) -> None:
        """Decode these requests from now on. `last_tokens` are their newest tokens, not in the cache yet; `sampling` is
        how each one's tokens are drawn (None: greedily). Raises ConfigError for an empty batch, and for requests to
        sample on a greedy runner."""
        if not requests:
            raise ConfigError("a decode batch needs at least one request")
        sampling = self._checked(requests, sampling)
        self.flush()
        self._requests = list(requests)
        size = len(requests)
        fitting = bisect_left(self.batch_sizes, size)
        self._padded_size = self.batch_sizes[fitting] if fitting < len(self.batch_sizes) else 0
        self._state = self._static if self._padded_size else DecodeState(size, self._static.device)
        self.reader = TokenReader(size, self._static.device)
        self._sampled_B = self._state.input_ids_B[:size]
        self._padded_logits = None  # those of the last batch are nobody's here
        self._state.load([r.row for r in requests], [r.seq_len for r in requests], last_tokens)
        if self.sampling:
            self._state.load_sampling(sampling)
        self._steps_reserved = 0

    @torch.inference_mode()
    def step(self, *, replay: bool = True) -> None:
        """One token for every request. Nothing is waited for: `reader` has the tokens, `logits_BX` the logits.
        `replay=False` launches what the graph holds kernel by kernel: the same step, slower, with its phases marked.
        Raises KVCacheFull or ConfigError (context limit)."""
        if self._steps_reserved == 0:
            with mark(METADATA):
                self._reserve()
        if self._padded_size == 0:
            logits = self._eager_step()
        elif self.graphs is not None:
            logits = self._replay(self._padded_size) if replay else self._launch(self._padded_size)
        else:
            logits = self._static_step(self._padded_size)
        self._steps_reserved -= 1
        self._steps_unrecorded += 1
        self._padded_logits = logits
        if logits is not None:
            with mark(SAMPLING):
                self.reader.push(self._sampled_B)

    def flush(self) -> None:
        """Bring the requests' `seq_len` on the host up to date with the steps taken."""
        for request in self._requests:
            request.seq_len += self._steps_unrecorded
        self._steps_unrecorded = 0

    def _checked(
        self, requests: Sequence[CachedRequest], sampling: Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        sampling = [GREEDY] * len(requests) if sampling is None else sampling
        if len(sampling) != len(requests):
            raise ConfigError(
                f"sampling holds {len(sampling)} requests' parameters, the batch has {len(requests)}"
            )
        drawn = [(i, params.temperature) for i, params in enumerate(sampling) if params.temperature > 0]
        if drawn and not self.sampling:
            raise ConfigError(
                f"sampling.temperature={drawn[0][1]} for request {drawn[0][0]}: this decode runner is greedy "
                "(temperature 0); make it with sampling=True"
            )
        return sampling

    def _capture(self) -> GraphSet:
        if not self._plans_on_host:
            return GraphSet(self._capture_step, self.batch_sizes)
        init_metadata = self.runner.backend.init_forward_metadata_capture_cuda_graph
        return GraphSet(self._capture_step, self.batch_sizes, lambda size: self._prepare(size, init_metadata))

    def _capture_step(self, batch_size: int) -> Tensor | None:
        """What a graph holds: the whole step, or, for a backend that plans on the host, all but the preparation."""
        if not self._plans_on_host:
            return self._static_step(batch_size)
        return self._compute(self._static.batch(batch_size, self.max_seq_len_k), self._static)

    def _replay(self, batch_size: int) -> Tensor | None:
        assert self.graphs is not None
        if self._plans_on_host:
            self._prepare(batch_size, self.runner.backend.init_forward_metadata_replay_cuda_graph)
        return self.graphs.replay(batch_size)

    def _launch(self, batch_size: int) -> Tensor | None:
        """What `_replay` does, without the graph."""
        if not self._plans_on_host:
            return self._static_step(batch_size)
        batch = self._prepare(batch_size, self.runner.backend.init_forward_metadata_replay_cuda_graph)
        return self._compute(batch, self._static)

    def _static_step(self, batch_size: int) -> Tensor | None:
        """The step on the static buffers: what a graph captures, and what `simulate` runs."""
        batch = self._prepare(batch_size, self.runner.backend.init_forward_metadata_capture_cuda_graph)
        return self._compute(batch, self._static)

    def _prepare(
        self, batch_size: int, init_metadata: Callable[[ForwardBatch, Tensor, CudaGraphState], object]
    ) -> ForwardBatch:
        """The next step's lengths, positions, slots and metadata in the static buffers."""
        table = self.runner.req_to_token_RW
        assert self.graph_state is not None
        with mark(METADATA):
            batch = self._static.advance(batch_size, table, self.max_seq_len_k)
            if self._plans_on_host:
                batch.seq_lens_cpu = self._lens_after_step(batch_size)
            init_metadata(batch, table, self.graph_state)
        return batch

    def _eager_step(self) -> Tensor | None:
        size, table = len(self._requests), self.runner.req_to_token_RW
        lens = self._lens_after_step(size)
        with mark(METADATA):
            batch = self._state.advance(size, table, max(lens))
            batch.seq_lens_cpu = lens
            self.runner.backend.init_forward_metadata(batch, table)
        return self._compute(batch, self._state)

    def _compute(self, batch: ForwardBatch, state: DecodeState) -> Tensor | None:
        """Model and sampling; the sampled tokens are the next step's input."""
        logits = self.runner.compute_logits(self.runner.forward(batch))
        if logits is not None:
            with mark(SAMPLING):
                if self.sampling:
                    state.sample(logits)
                else:
                    ops.argmax(logits, out=state.input_ids_B[: batch.batch_size])
        return logits

    def _lens_after_step(self, batch_size: int) -> tuple[int, ...]:
        taken = self._steps_unrecorded + 1
        lens = [request.seq_len + taken for request in self._requests]
        return (*lens, *([1] * (batch_size - len(lens))))

    def _reserve(self) -> None:
        """Slots for the next steps: as many as `kv.reserve_ahead` where the pool and the context limit allow."""
        self.flush()
        cache = self.runner.cache
        limit = cache.req_to_token.max_context_len
        longest = max(request.seq_len for request in self._requests)
        if self._padded_size:  # the static page table is no wider
            limit = min(limit, self.max_seq_len_k)
            if longest >= limit:
                raise ConfigError(
                    f"a request of {longest + 1} tokens passes the context limit of {limit} tokens that decode steps "
                    f"were captured for; shorten the workload's context, prompt or steps"
                )
        ahead = max(1, min(self._reserve_ahead, limit - longest))
        try:
            cache.reserve(self._requests, [request.seq_len + ahead for request in self._requests])
        except KVCacheFull:
            cache.reserve(self._requests, [request.seq_len + 1 for request in self._requests])
            ahead = 1
        self._steps_reserved = ahead
