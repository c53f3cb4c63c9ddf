"""`workload=extend` and `workload=mixed`: one ragged pass in which requests gain new tokens over a cached prefix; with
`workload.chunk_size`, as many passes as that takes (chunked prefill)."""

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
    """The passes are the same every time: their tokens take the same slots, so nothing grows while they are timed."""

    @abstractmethod
    def _lens(self) -> list[tuple[int, int]]:
        """(tokens in the cache, new tokens) of each request."""

    def _chunk_size(self) -> int | None:
        """New tokens of a request in one pass; None: all."""
        return None

    def needs(self) -> Needs:
        lens = self._lens()
        chunk = self._chunk_size() or max(new for _, new in lens)
        return Needs(tuple(prefix + new for prefix, new in lens), sum(min(new, chunk) for _, new in lens))

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = open_with_context(engine, [prefix for prefix, _ in self._lens()])
        generator = torch.Generator().manual_seed(self.config.seed)
        vocab_size = self.config.model.vocab_size
        self.tokens = [random_tokens(new, vocab_size, generator) for _, new in self._lens()]
        fill_context(engine, self.config.seed)
        chunk = self._chunk_size() or max(map(len, self.tokens))
        self._batches = [
            engine.runner.prepare_extend(self.requests, [tokens[at : at + chunk] for tokens in self.tokens])
            for at in range(0, max(map(len, self.tokens)), chunk)
        ]

    def units(self) -> list[Unit]:
        # One name for all chunk sizes, that of text's chunked prefill: also for a chunk that holds everything.
        name = "extend_pass" if self._chunk_size() is None else "prefill"
        new = sum(map(len, self.tokens))
        whole = None if name == "extend_pass" else sum(prefix + count for prefix, count in self._lens())
        return [Unit(name, self._run, new, self.config.measure.repeats, prompt_tokens=whole)]

    def _run(self) -> Tensor | None:
        for batch in self._batches:
            logits = self.engine.runner.extend_pass(batch)
        return logits

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        logits = self._run()
        if logits is None:
            return [self.current_pass()], []
        cases = []
        for i in checked(self.config, len(self.requests)):
            prefix, new = self._lens()[i]
            at = torch.tensor([new - 1])
            row, own = self.requests[i].row, logits[i : i + 1].clone()
            cases.append(Case(row, prefix, self.tokens[i], at, own, i))
        return [self.current_pass()], cases

    def current_pass(self) -> Pass:
        last = self._batches[-1]
        rows, lens = [r.row for r in self.requests], [r.seq_len for r in self.requests]
        return Pass(rows, lens, list(last.extend_seq_lens_cpu), last.num_tokens, last.mode)

    def batch(self) -> ForwardBatch:
        return self._batches[-1]


class Extend(_RaggedPass):
    """`new_len` new tokens each over `prefix_len` cached ones, `chunk_size` of them at a time. The oracle repeats all
    new tokens in one pass; at `level=attention` it looks at the last chunk."""

    name = "extend"

    def _lens(self) -> list[tuple[int, int]]:
        return [(self.options.prefix_len, self.options.new_len)] * int(self.options.batch_size)

    def _chunk_size(self) -> int | None:
        size: int | None = self.options.chunk_size
        return size


class Mixed(_RaggedPass):
    """Extending and decoding requests in one ragged batch, as a scheduler with chunked prefill makes it."""

    name = "mixed"

    def _lens(self) -> list[tuple[int, int]]:
        options = self.options
        extending = [(options.prefix_len, options.new_len)] * int(options.extend_requests)
        return extending + [(options.context_len, 1)] * int(options.decode_requests)
