"""`workload=extend` and `workload=mixed`: one ragged pass in which requests gain new tokens over a cached prefix."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch
from fa_research.engine.engine import Engine, Needs
from fa_research.workloads.base import (
    Case,
    Pass,
    Unit,
    Workload,
    checked,
    fill_context,
    open_with_context,
    random_tokens,
)


class _RaggedPass(Workload):
    """The pass is the same every time: its tokens take the same slots, so nothing grows while it is timed."""

    @abstractmethod
    def _lens(self) -> list[tuple[int, int]]:
        """(tokens in the cache, new tokens) of each request."""

    def needs(self) -> Needs:
        lens = self._lens()
        return Needs(tuple(prefix + new for prefix, new in lens), sum(new for _, new in lens))

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = open_with_context(engine, [prefix for prefix, _ in self._lens()])
        generator = torch.Generator().manual_seed(self.config.seed)
        vocab_size = self.config.model.vocab_size
        self.tokens = [random_tokens(new, vocab_size, generator) for _, new in self._lens()]
        fill_context(engine, self.config.seed)
        self._batch = engine.runner.prepare_extend(self.requests, self.tokens)

    def units(self) -> list[Unit]:
        return [Unit("extend_pass", self._run, self._batch.num_tokens, self.config.measure.repeats)]

    def _run(self) -> Tensor | None:
        return self.engine.runner.extend_pass(self._batch)

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        logits = self._run()
        if logits is None:
            return [self.current_pass()], []
        cases = []
        for i in checked(self.config, len(self.requests)):
            prefix, new = self._lens()[i]
            at = torch.tensor([new - 1])
            cases.append(Case(self.requests[i].row, prefix, self.tokens[i], at, logits[i : i + 1].clone()))
        return [self.current_pass()], cases

    def current_pass(self) -> Pass:
        extend_lens = [new for _, new in self._lens()]
        rows, lens = [r.row for r in self.requests], [r.seq_len for r in self.requests]
        return Pass(rows, lens, extend_lens, self._batch.num_tokens, self._batch.mode)

    def batch(self) -> ForwardBatch:
        return self._batch


class Extend(_RaggedPass):
    """`new_len` new tokens each over `prefix_len` cached ones."""

    name = "extend"

    def _lens(self) -> list[tuple[int, int]]:
        return [(self.options.prefix_len, self.options.new_len)] * int(self.options.batch_size)


class Mixed(_RaggedPass):
    """Extending and decoding requests in one ragged batch, as a scheduler with chunked prefill makes it."""

    name = "mixed"

    def _lens(self) -> list[tuple[int, int]]:
        options = self.options
        extending = [(options.prefix_len, options.new_len)] * int(options.extend_requests)
        return extending + [(options.context_len, 1)] * int(options.decode_requests)
