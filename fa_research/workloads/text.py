"""`workload=text`: real text, as the tokens of a checkpoint's tokenizer or as bytes; prompts that share a prefix are
extended in chunks, then decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.config import Level
from fa_research.engine.engine import Engine, Needs
from fa_research.engine.sampling import sample
from fa_research.kv_cache import CachedRequest
from fa_research.models.tokenizer import Tokenizer, load_tokenizer
from fa_research.phases import SAMPLING, mark
from fa_research.workloads.base import Case, Pass, Unit, checked
from fa_research.workloads.corpus import Passage, read_passages
from fa_research.workloads.decoding import Decoding
from fa_research.workloads.generation import Generation, prompt_tokens, tokenizer_notes, typed_bytes

# Whether a prefill pass is that of the shared prefix, its batch, its hidden states [T, E].
Observe = Callable[[bool, ForwardBatch, Tensor], object]


class Text(Decoding):
    """The shared prefix is computed once, in a request of its own; the prompts fork from it, whole pages at a
    time, and extend what is left."""

    name = "text"
    reprefill = True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.model)

    @cached_property
    def passages(self) -> list[Passage]:
        return read_passages(self.options, self.tokenizer)

    @property
    def prompts(self) -> list[list[int]]:
        return [passage.prompt for passage in self.passages]

    @property
    def writes(self) -> bool:
        """Whether there is text to show."""
        return self.options.generate > 0 and self.options.level is Level.model

    @cached_property
    def opening(self) -> list[int]:
        """What generated text follows."""
        options = self.options
        if options.prompt is None:
            return self.prompts[0]
        return prompt_tokens(
            "workload.prompt", typed_bytes(options.prompt), options.generate, self.config.model, self.tokenizer,
            instead=", or null for the beginning of workload.path",
        )  # fmt: skip

    def needs(self) -> Needs:
        options = self.options
        longest = len(self.prompts[0]) + self.most_steps  # read now: what is wrong with the text comes first
        again = options.prompt_len + options.steps  # the re-prefill of the check
        lens = [*[longest] * options.batch_size, max(1, options.shared_prefix_len), again]
        if self.writes:
            lens.append(len(self.opening) + options.generate - 1)  # the last token is not read again
        return Needs(tuple(lens), max(again, options.batch_size * options.chunk_size))

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        engine.notes += self._notes()
        self.requests: list[CachedRequest] = []
        self.generated: list[list[int]] = []
        longest = self.options.prompt_len + self.most_steps
        self.decoder = engine.decoder(self.options.batch_size, longest)

    def _notes(self) -> list[str]:
        notes = []
        if self.options.path is None:
            notes.append(
                "text of the Python standard library: files that the shipped model was not trained on"
            )
        notes += tokenizer_notes(self.config.model, self.tokenizer)
        if self.options.generate and not self.writes:
            notes.append(
                f"workload.generate={self.options.generate}: the attention path alone writes no text"
            )
        return notes

    def generation(self, engine: Engine) -> Generation:
        """The text that `workload.generate` asks for; it may run before `prepare`."""
        options = self.options
        return Generation(engine, self.tokenizer, self.opening, options.generate, options.chunk_size)

    def units(self) -> list[Unit]:
        size, prompt_len, shared = (
            int(x) for x in (self.options.batch_size, self.options.prompt_len, self.options.shared_prefix_len)
        )
        # Whole pages of the prefix are shared; what is left of it each prompt computes again.
        computed = shared + size * (prompt_len - self._shared_slots())
        repeats = min(5, self.config.measure.repeats)
        return [
            Unit("prefill", self.prefill, computed, repeats, prompt_tokens=size * prompt_len),
            self.decode_unit(size, self._restart),
        ]

    def prefill(self, observe: Observe | None = None) -> Tensor | None:
        """All prompts from nothing; logits [B, X] of their last tokens (None for the attention path alone, where
        nothing is sampled). Decoding starts where it ends. `observe` sees every pass."""
        for request in self.requests:
            self.engine.cache.close(request)
        runner, options = self.engine.runner, self.options
        watch_shared, watch = (observe and partial(observe, shared) for shared in (True, False))
        self.requests = []
        shared = self.prompts[0][: options.shared_prefix_len]
        if shared:
            parent = self.engine.cache.open()
            runner.extend_in_chunks([parent], [shared], options.chunk_size, watch_shared)
            self.requests = [self.engine.cache.fork(parent, len(shared)) for _ in self.prompts]
            self.engine.cache.close(parent)
        else:
            self.requests = [self.engine.cache.open() for _ in self.prompts]
        rest = [prompt[r.seq_len :] for r, prompt in zip(self.requests, self.prompts, strict=True)]
        logits = runner.extend_in_chunks(self.requests, rest, options.chunk_size, watch)
        if logits is None:
            self.first_tokens = torch.zeros(len(self.requests))
        else:
            with mark(SAMPLING):
                self.first_tokens = sample(logits, self.sampling, [r.seq_len for r in self.requests])
        self.start(self.first_tokens)
        return logits

    def _restart(self) -> None:
        self.restart([self.options.prompt_len] * len(self.requests), self.first_tokens)

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        """The prompts and `steps` tokens after them; every token's logits are kept for the checked requests."""
        first = self.prefill()
        prefilled = self._last_prefill_pass()
        if first is None:
            for _ in range(self.options.steps):
                self.decoder.step()
            return [prefilled, self.current_pass()], []
        chosen = checked(self.config, len(self.requests))
        logits, tokens = [first[chosen]], [self.first_tokens.tolist()]
        for _ in range(self.options.steps - 1):
            self.decoder.step()
            assert self.decoder.logits_BX is not None
            logits.append(self.decoder.logits_BX[chosen].clone())
            if len(self.decoder.reader) > 1:
                tokens.append(self.decoder.reader.pop())
        while len(self.decoder.reader):
            tokens.append(self.decoder.reader.pop())
        self.generated = [list(request) for request in zip(*tokens, strict=True)]
        cases = [self._case(i, torch.stack(logits)[:, n]) for n, i in enumerate(chosen)]
        return [prefilled, self.current_pass()], cases

    def _case(self, index: int, logits_MX: Tensor) -> Case:
        tokens = self.prompts[index] + self.generated[index][:-1]
        at = torch.arange(len(self.prompts[index]) - 1, len(tokens))
        return Case(self.requests[index].row, 0, torch.tensor(tokens), at, logits_MX, index)

    def _last_prefill_pass(self) -> Pass:
        """The prompts' last chunks; all prompts are as long and share as much."""
        size, prompt_len = len(self.requests), int(self.options.prompt_len)
        last = (prompt_len - self._shared_slots() - 1) % int(self.options.chunk_size) + 1
        rows = [request.row for request in self.requests]
        return Pass(rows, [prompt_len] * size, [last] * size, last * size, ForwardMode.EXTEND)

    def _shared_slots(self) -> int:
        """Tokens of the shared prefix in whole pages, which no prompt computes for itself."""
        page_size = self.engine.cache.page_size
        return int(self.options.shared_prefix_len) // page_size * page_size
