"""Text that a model writes: one prompt, prefilled in chunks, then decoded through the same steps that are measured.

Legend: X vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns

from fa_research.config import ModelConfig
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.engine import Engine
from fa_research.engine.sampling import sample, sampling_params
from fa_research.engine.token_reader import TokenReader
from fa_research.errors import ConfigError
from fa_research.kv_cache import CachedRequest
from fa_research.models.tokenizer import Tokenizer


def prompt_tokens(
    key: str, text: bytes, generate: int, model: ModelConfig, tokenizer: Tokenizer, instead: str = ""
) -> list[int]:
    """A prompt as tokens, the tokenizer's `leading_ids` before it. `key` names it in errors, `instead` what would work
    besides a text. Raises ConfigError for an empty prompt, or one that leaves no room for `generate` tokens."""
    if not text:
        raise ConfigError(f"{key} is empty; give some text{instead}")
    tokens = [*tokenizer.leading_ids, *tokenizer.encode(text).ids]
    total = len(tokens) + generate
    if total > model.max_context_len:
        raise ConfigError(
            f"{key} of {len(tokens)} tokens + workload.generate={generate} = {total} tokens: must be "
            f"at most model.max_context_len={model.max_context_len}"
        )
    return tokens


def typed_bytes(text: str) -> bytes:
    """The bytes of a text from the command line, which may hold any."""
    return text.encode("utf-8", "surrogateescape")


def tokenizer_notes(model: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """How text becomes tokens with a checkpoint; nothing without one."""
    if model.path is None:
        return []
    how = "as bytes: no tokenizer.json" if tokenizer.name == "bytes" else f"by {tokenizer.name}"
    front = f", every prompt begins with token {tokenizer.leading_ids}" if tokenizer.leading_ids else ""
    return [f"text {how}{front}"]


@dataclass(slots=True)
class Generation:
    """A prompt, and how many tokens are to follow it at most; fewer where the model ends the text.

    Attributes:
        decoder: of this one request; it is made here, so that no time of the text holds the capture of graphs.
        ahead: whether a step is launched before the token of the step before it is waited for. On the CPU nothing runs
            beside the host, and a token would only be seen a step late.
        written: the tokens of the newest text, the one that ended it included.
        started_ns, arrived_ns: the host's clock (`time.perf_counter_ns`) when its prefill began, and when each of its
            tokens was on the host.
    """

    engine: Engine
    tokenizer: Tokenizer
    prompt: list[int]
    count: int
    chunk_size: int
    decoder: DecodeRunner = field(init=False)
    ahead: bool = field(init=False)
    written: list[int] = field(init=False, default_factory=list)
    started_ns: int = field(init=False, default=0)
    arrived_ns: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = self.engine.decoder(1, len(self.prompt) + self.count)
        self.ahead = self.engine.device.type == "cuda"

    @property
    def ended(self) -> bool:
        """Whether the model ended the newest text, rather than `count`."""
        return bool(self.written) and self.written[-1] in self.tokenizer.eos

    def text(self) -> Iterator[str]:
        """The prompt's text, then what the model writes, piece by piece as its tokens come; the pieces are whole
        characters. Frees what it took from the cache."""
        stream = self.tokenizer.stream()
        yield "".join(map(stream.put, self.prompt))
        for token in self.tokens():
            yield stream.put(token)
        yield stream.end()

    def tokens(self) -> Generator[int]:
        """The ids that follow the prompt, without one that ends the text."""
        cache, steps = self.engine.cache, 0
        self.written, self.arrived_ns = [], []
        request = cache.open()
        try:
            self.started_ns = perf_counter_ns()
            first = self._prefill(request)
            for number in range(self.count):
                # The first token is waited for before any step: it is as early as it can be.
                while number and steps < min(number + self.ahead, self.count - 1):
                    self.decoder.step()
                    steps += 1
                if (token := self._read(self.decoder.reader if number else first)) in self.tokenizer.eos:
                    return
                yield token
        finally:
            cache.close(request)

    def _prefill(self, request: CachedRequest) -> TokenReader:
        """Extend by the prompt and start decoding; the reader holds the first token."""
        logits_1X = self.engine.runner.extend_in_chunks([request], [self.prompt], self.chunk_size)
        assert logits_1X is not None, "the attention path alone writes no text"
        reader = TokenReader(1, self.engine.device)
        params = sampling_params(self.engine.config, 1)
        sampled = sample(logits_1X, params, [len(self.prompt)])
        reader.push(sampled)
        self.decoder.start([request], sampled, params)
        return reader

    def _read(self, reader: TokenReader) -> int:
        (token,) = reader.pop()
        self.arrived_ns.append(perf_counter_ns())
        self.written.append(token)
        return token
