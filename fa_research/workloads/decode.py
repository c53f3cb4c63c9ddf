"""`workload=decode`: a batch of requests with a context in the cache, one token each per step."""

from __future__ import annotations

import random

import torch

from fa_research.engine.engine import Engine, Needs
from fa_research.workloads.base import (
    Case,
    Pass,
    Unit,
    checked,
    fill_context,
    open_with_context,
    random_tokens,
)
from fa_research.workloads.decoding import Decoding


class Decode(Decoding):
    """The context is random keys and values, so no prefill precedes; `length_spread` makes lengths unequal."""

    name = "decode"

    def _context_lens(self) -> list[int]:
        options = self.options
        shortest = max(1, round(options.context_len * (1 - options.length_spread)))
        rng = random.Random(self.config.seed)
        lens = [rng.randint(shortest, options.context_len) for _ in range(options.batch_size)]
        return [options.context_len, *lens[1:]]

    def needs(self) -> Needs:
        return Needs(
            tuple(length + self.most_steps for length in self._context_lens()), self.options.batch_size
        )

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = open_with_context(engine, self._context_lens())
        # Slots for every step at once: no step of the measurement asks the allocator.
        engine.cache.reserve(self.requests, [r.seq_len + self.most_steps for r in self.requests])
        fill_context(engine, self.config.seed)
        longest = max(self.needs().seq_lens)
        self.decoder = engine.decoder(len(self.requests), longest)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.tokens = random_tokens(len(self.requests), self.config.model.vocab_size, generator)
        self.start(self.tokens)

    def units(self) -> list[Unit]:
        return [self.decode_unit(len(self.requests), self._restart)]

    def _restart(self) -> None:
        self.restart(self._context_lens(), self.tokens)

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        self.decoder.flush()
        inputs_B = self.decoder.state.input_ids_B[: len(self.requests)].clone()
        prefix_lens = [request.seq_len for request in self.requests]
        self.decoder.step()
        logits = self.decoder.logits_BX
        result = [self.current_pass()]
        if logits is None:
            return result, []
        at = torch.zeros(1, dtype=torch.int64)
        cases = [
            Case(self.requests[i].row, prefix_lens[i], inputs_B[i : i + 1], at, logits[i : i + 1].clone(), i)
            for i in checked(self.config, len(self.requests))
        ]
        return result, cases
