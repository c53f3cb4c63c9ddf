"""Text that a model writes: one prompt, prefilled in chunks, then decoded through the same steps that are measured.

Legend: X vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fa_research.config import ModelConfig, TextWorkload
from fa_research.engine.engine import Engine
from fa_research.engine.sampling import sample, sampling_params
from fa_research.engine.token_reader import TokenReader
from fa_research.errors import ConfigError
from fa_research.models.tokenizer import Tokenizer


def prompt_tokens(options: TextWorkload, model: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """`workload.prompt` as tokens, the tokenizer's `front` before it. Raises ConfigError for an empty prompt, or one
    that leaves no room for `workload.generate` tokens."""
    assert options.prompt is not None
    text = options.prompt.encode("utf-8", "surrogateescape")  # a command line may hold any bytes
    if not text:
        raise ConfigError(
            "workload.prompt is empty; give some text, or null for the beginning of workload.path"
        )
    tokens = [*tokenizer.leading_ids, *tokenizer.encode(text).ids]
    total = len(tokens) + options.generate
    if total > model.max_context_len:
        raise ConfigError(
            f"workload.prompt of {len(tokens)} tokens + workload.generate={options.generate} = {total} tokens: must be "
            f"at most model.max_context_len={model.max_context_len}"
        )
    return tokens


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt, and how many tokens are to follow it at most; fewer where the model ends the text."""

    engine: Engine
    tokenizer: Tokenizer
    prompt: list[int]
    count: int
    chunk_size: int

    def text(self) -> Iterator[str]:
        """The prompt's text, then what the model writes, piece by piece, each a step behind the device; the pieces are
        whole characters. Frees what it took from the cache."""
        stream = self.tokenizer.stream()
        yield "".join(map(stream.put, self.prompt))
        for token in self.tokens():
            yield stream.put(token)
        yield stream.end()

    def tokens(self) -> Iterator[int]:
        """The ids that follow the prompt, without one that ends the text."""
        cache = self.engine.cache
        request = cache.open()
        try:
            logits_1X = self.engine.runner.extend_in_chunks([request], [self.prompt], self.chunk_size)
            assert logits_1X is not None, "the attention path alone writes no text"
            first = TokenReader(1, self.engine.device)
            params = sampling_params(self.engine.config, 1)
            sampled = sample(logits_1X, params, [len(self.prompt)])
            first.push(sampled)
            decoder = self.engine.decoder(1, len(self.prompt) + self.count)
            decoder.start([request], sampled, params)
            for step in range(self.count):
                if step < self.count - 1:  # launched before the token is waited for
                    decoder.step()
                (token,) = (first if len(first) else decoder.reader).pop()
                if token in self.tokenizer.eos:
                    return
                yield token
        finally:
            cache.close(request)
