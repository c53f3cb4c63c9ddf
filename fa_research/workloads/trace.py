"""`workload=trace`: a service's requests replayed through the paged cache, then one decode step and one extend pass
over the page tables that the replay left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode, extend_batch
from fa_research.engine.engine import Engine, Needs
from fa_research.errors import ConfigError
from fa_research.workloads.base import Case, Pass, Unit, checked, fill_context, random_tokens
from fa_research.workloads.decoding import Decoding
from fa_research.workloads.replay import Replay, Replayed
from fa_research.workloads.replay_columns import replay_columns
from fa_research.workloads.traces import Trace, read_trace

_TABLE_ENTRY_BYTES = 4  # int32


class TraceReplay(Decoding):
    """The decode step is that of all requests which are live when the last one is admitted. The extend pass is the end
    of that last one's prompt, at most `chunk_size` tokens, over the tokens in front of it. Keys and values are
    random."""

    name = "trace"

    @cached_property
    def trace(self) -> Trace:
        limit = self.options.max_context or self.config.model.max_context_len - self.most_steps
        return read_trace(self.options.path, self.options.requests, limit)

    def needs(self) -> Needs:
        options = self.options
        longest = max(request.final_length for request in self.trace.requests) + self.most_steps
        return Needs(
            seq_lens=(longest,) * options.concurrency,
            tokens_per_pass=max(options.concurrency, options.chunk_size),
            pool_tokens=options.pool_tokens or 1,  # null: kv.* says
        )

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        retained_pages = int(self.options.retained_fraction * engine.cache.allocator.num_pages)
        self.replay = Replay(
            engine.cache, self.options.concurrency, self.options.prefix_sharing, retained_pages
        )
        began = time.perf_counter()
        self.replay.run(self.trace.requests)
        self.replay_s = time.perf_counter() - began
        engine.notes += self._notes()
        self._left = self._what_is_left()
        self._make_room()
        self.requests = [live.cached for live in self.replay.live]
        self.context_lens = [request.seq_len for request in self.requests]
        fill_context(engine, self.config.seed)
        self.decoder = engine.decoder(len(self.requests), max(self.context_lens) + self.most_steps)
        generator = torch.Generator().manual_seed(self.config.seed)
        vocab_size = self.config.model.vocab_size
        self.tokens = random_tokens(len(self.requests), vocab_size, generator)
        self._prepare_extend(self.replay.live[-1], generator)
        self._restart()

    def _notes(self) -> list[str]:
        notes, counts = list(self.trace.notes), self.replay.counts
        if counts.never_fit:
            notes.append(
                f"trace: {counts.never_fit} requests are longer than the whole pool and were never admitted"
            )
        if not self.replay.live:
            raise ConfigError(
                f"workload.pool_tokens={self.options.pool_tokens}: none of the {counts.never_fit} requests fits; "
                "give a larger pool or a smaller workload.max_context"
            )
        if not counts.memory_bound_steps:
            notes.append(
                f"trace: workload.concurrency={self.options.concurrency} was the limit and never memory; "
                "for the capacity of the pool raise it, give more workload.requests or a smaller pool"
            )
        if self.options.prefix_sharing and not any(request.blocks for request in self.trace.requests):
            notes.append("trace: it says nothing of prefixes, so nothing is shared")
        return notes

    def _what_is_left(self) -> dict[str, Any]:
        """Page tables at the end of the replay, as columns."""
        pages = [len(live.cached.pages) for live in self.replay.live]
        layers = len(self.engine.specs)
        return {
            "trace_page_table_bytes": len(pages) * max(pages) * _TABLE_ENTRY_BYTES,
            "trace_page_table_bytes_read": sum(pages) * layers * _TABLE_ENTRY_BYTES,
        }

    def _make_room(self) -> None:
        """Slots for the timed steps: those of the prefix cache, and where these are too few, of the requests that were
        admitted first; the last one stays, since its prompt is extended. Its pages must be its own for that."""
        cache, live = self.engine.cache, self.replay.live
        cache.forget_prefixes()
        dropped = 0
        while True:
            wanted = [request.cached.seq_len + self.most_steps for request in live]
            new = [-(-n // cache.page_size) - len(r.cached.pages) for n, r in zip(wanted, live, strict=True)]
            if sum(new) <= cache.allocator.pages_free or len(live) == 1:
                break
            cache.close(live.pop(0).cached)
            dropped += 1
        if dropped:
            self.engine.notes.append(
                f"trace: {dropped} requests were dropped before the timed steps, for which the pool had no room"
            )
        cache.reserve([request.cached for request in live], wanted)

    def _prepare_extend(self, last: Replayed, generator: torch.Generator) -> None:
        """The end of the prompt that was admitted last."""
        length = last.trace.input_length
        self._prefix_len = max(last.shared_len, length - int(self.options.chunk_size))
        self._prompt = random_tokens(length - self._prefix_len, self.config.model.vocab_size, generator)
        table = self.engine.runner.req_to_token_RW
        self._extend_batch = extend_batch(table, [last.cached.row], [self._prefix_len], [self._prompt])

    def units(self) -> list[Unit]:
        repeats = self.config.measure.repeats
        return [
            Unit("extend_pass", self._extend, len(self._prompt), repeats, reset=self._turn_to_extend),
            self.decode_unit(len(self.requests), self._restart, self._step),
        ]

    def _extend(self) -> Tensor | None:
        self._turn_to_extend()
        return self.engine.runner.extend_pass(self._extend_batch)

    def _turn_to_extend(self) -> None:
        self._extending = True

    def _step(self, *, replay: bool = True) -> None:
        self._extending = False
        self.decoder.step(replay=replay)

    def _restart(self) -> None:
        self._extending = False
        self.restart(self.context_lens, self.tokens)

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        """The extend pass first: it writes what the decode step reads."""
        logits = self._extend()
        extended = self.current_pass()
        inputs_B = self.decoder.state.input_ids_B[: len(self.requests)].clone()
        self._step()
        stepped = self.current_pass()
        if logits is None or self.decoder.logits_BX is None:
            return [extended, stepped], []
        at = torch.tensor([len(self._prompt) - 1])
        cases = [Case(extended.rows[0], self._prefix_len, self._prompt, at, logits.clone())]
        for i in checked(self.config, len(self.requests)):
            row, prefix_len = stepped.rows[i], stepped.seq_lens[i] - 1
            logits_MX = self.decoder.logits_BX[i : i + 1].clone()
            own = inputs_B[i : i + 1]
            cases.append(Case(row, prefix_len, own, torch.zeros_like(at), logits_MX, i))
        return [extended, stepped], cases

    def current_pass(self) -> Pass:
        if not self._extending:
            return super().current_pass()
        new, row = len(self._prompt), self.requests[-1].row
        return Pass([row], [self._prefix_len + new], [new], new, ForwardMode.EXTEND)

    def batch(self) -> ForwardBatch:
        return self._extend_batch if self._extending else super().batch()

    def columns(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        columns = replay_columns(self.replay.counts, self.engine.cache.page_size) | self._left
        columns |= {"trace_replay_s": self.replay_s, "trace_step_requests": len(self.requests)}
        columns["trace_step_tokens"] = sum(self.context_lens)
        if step_us := metrics.get("decode_step_us"):
            per_token_us = step_us / sum(self.context_lens)
            mean_step_us = per_token_us * columns["trace_live_tokens_mean"]
            columns["trace_tokens_per_s"] = columns["trace_live_requests_mean"] / mean_step_us * 1e6
        return columns
