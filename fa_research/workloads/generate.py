"""`workload=generate`: the text that follows one prompt, timed as it is written.

Legend: X vocabulary.
"""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fa_research.engine.engine import Engine, Needs
from fa_research.engine.sampling import sample
from fa_research.errors import ConfigError
from fa_research.models.tokenizer import Tokenizer, load_tokenizer
from fa_research.workloads.base import Case, Pass, Unit, pick
from fa_research.workloads.decoding import Decoding
from fa_research.workloads.generation import Generation, prompt_tokens, tokenizer_notes, typed_bytes

_CHECKED_TOKENS = 256  # at most; a position's logits are a whole vocabulary, in float64 too


class Generate(Decoding):
    """The text comes from `generation` between `prepare` and the check. The check decodes its tokens again and keeps
    the logits, which takes time that the text's own steps must not have."""

    name = "generate"
    reprefill = True
    generation: Generation

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.model)

    @cached_property
    def prompt(self) -> list[int]:
        """The prompt's tokens. Raises ConfigError for a file that cannot be read."""
        options = self.options
        if options.prompt_file is None:
            key, text = "workload.prompt", typed_bytes(options.prompt)
        else:
            key, text = f"workload.prompt_file={options.prompt_file}", _read_prompt(options.prompt_file)
        return prompt_tokens(key, text, options.generate, self.config.model, self.tokenizer)

    def needs(self) -> Needs:
        longest = len(self.prompt) + self.options.generate - 1  # the last token is not read again
        return Needs((longest,), longest)  # of the text, of the check, and of its prefill: never two at once

    def prepare(self, engine: Engine) -> None:
        """Capture, then write the first `measure.warmup` tokens untimed, so that kernels are compiled and chosen
        for the prompt's length."""
        self.engine = engine
        self.requests = []
        engine.notes += tokenizer_notes(self.config.model, self.tokenizer)
        chunk_size = self.options.chunk_size or len(self.prompt)
        self.generation = Generation(engine, self.tokenizer, self.prompt, self.options.generate, chunk_size)
        self.decoder = self.generation.decoder
        with closing(self.generation.tokens()) as tokens:
            list(islice(tokens, self.config.measure.warmup))

    def units(self) -> list[Unit]:
        """None: the text is timed while it is written."""
        return []

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        """The same text decoded again, each step fed the token that was written; the logits of up to 256 of its tokens
        are kept, spread evenly."""
        written = self.generation.written
        kept = pick(len(written), _CHECKED_TOKENS)
        request = self.engine.cache.open()
        self.requests = [request]
        logits, chosen = self._decode_again(written, set(kept))
        if changed := sum(a != b for a, b in zip(written, chosen, strict=True)):
            self.engine.notes.append(
                f"the check decoded the text again and chose another token at {changed} of {len(written)} places; it "
                "was fed the text's own tokens"
            )
        tokens = torch.tensor([*self.prompt, *written[:-1]])
        at = torch.tensor([len(self.prompt) - 1 + number for number in kept])
        case = Case(request.row, 0, tokens, at, torch.cat(logits))
        passes = [self.current_pass()]
        self.engine.cache.close(request)
        return passes, [case]

    def _decode_again(self, written: list[int], kept: set[int]) -> tuple[list[Tensor], list[int]]:
        """Logits [1, X] at the kept numbers of the written tokens, and the token that was chosen at every number."""
        runner, chunk_size = self.engine.runner, self.generation.chunk_size
        logits_1X = runner.extend_in_chunks(self.requests, [self.prompt], chunk_size)
        assert logits_1X is not None
        logits = [logits_1X] if 0 in kept else []
        chosen = sample(logits_1X, self.sampling, [len(self.prompt)]).tolist()
        self.start(torch.tensor(written[:1], device=self.engine.device))
        for number in range(1, len(written)):
            self.decoder.step()
            assert self.decoder.logits_BX is not None
            if number in kept:
                logits.append(self.decoder.logits_BX.clone())
            chosen += self.decoder.reader.pop()
            self.decoder.state.input_ids_B[:1].fill_(written[number])
        return logits, chosen


def _read_prompt(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"workload.prompt_file={path}: cannot be read: {error.strerror}") from error
