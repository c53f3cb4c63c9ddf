"""What workloads that decode share: a batch of requests, its decode runner, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.sampling import SamplingParams, sampling_params
from fa_research.kv_cache import CachedRequest
from fa_research.phases import METADATA, mark
from fa_research.workloads.base import Pass, Unit, Workload


class Decoding(Workload):
    """A workload whose `requests` are decoded by `decoder`; `prepare` makes both."""

    requests: list[CachedRequest]
    decoder: DecodeRunner

    @property
    def sampling(self) -> list[SamplingParams]:
        """How each request's tokens are drawn."""
        return sampling_params(self.config, len(self.requests))

    def start(self, last_tokens: Tensor) -> None:
        """Decode from the requests' newest tokens on, which are not in the cache yet."""
        with mark(METADATA):
            self.decoder.start(self.requests, last_tokens, self.sampling)

    def restart(self, context_lens: Sequence[int], last_tokens: Tensor) -> None:
        """Decode again from these many tokens in the cache on: what the steps since then wrote is written over."""
        self.decoder.flush()
        self.decoder.runner.cache.shrink(self.requests, context_lens)
        self.start(last_tokens)

    def decode_unit(
        self, batch_size: int, reset: Callable[[], object], step: Callable[..., object] | None = None
    ) -> Unit:
        """One token for each request. `step` (None: the decoder's own) takes `replay` as `DecodeRunner.step`."""
        step, steps = step or self.decoder.step, int(self.options.steps)
        launch = partial(step, replay=False)
        return Unit("decode_step", step, batch_size, steps, host_time=True, reset=reset, launch=launch)

    def current_pass(self) -> Pass:
        self.decoder.flush()
        rows, lens = [r.row for r in self.requests], [r.seq_len for r in self.requests]
        return Pass(rows, lens, [1] * len(rows), self.decoder.padded_size, ForwardMode.DECODE)

    def batch(self) -> ForwardBatch:
        lens = tuple(self.current_pass().seq_lens)
        batch = self.decoder.state.batch(len(lens), max(lens))
        batch.seq_lens_cpu = lens
        return batch
