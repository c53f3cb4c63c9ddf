"""`workload=text`: real text, as the tokens of a checkpoint's tokenizer or as bytes; prompts that share a prefix are
extended in chunks, then decoded greedily."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from fa_research.batch import ForwardMode
from fa_research.config import TextWorkload
from fa_research.engine.engine import Engine, Needs
from fa_research.errors import ConfigError
from fa_research.kv_cache import CachedRequest
from fa_research.models.tokenizer import Encode, load_tokenizer
from fa_research.workloads.base import Case, Pass, Unit, pick
from fa_research.workloads.decoding import Decoding

_BYTE_VALUES = 256
_BYTES_PER_TOKEN = 64  # far more than any text has: what is encoded of a long text


class Text(Decoding):
    """The shared prefix is computed once, in a request of its own; the prompts fork from it, whole pages at a
    time, and extend what is left."""

    name = "text"
    reprefill = True

    def needs(self) -> Needs:
        options = self.options
        self.encode = load_tokenizer(self.config.model)
        if self.encode is None and self.config.model.vocab_size < _BYTE_VALUES:
            raise ConfigError(
                f"workload=text uses byte tokens: model.vocab_size={self.config.model.vocab_size} must be at least 256"
            )
        longest = options.prompt_len + self.most_steps
        again = options.prompt_len + options.steps  # the re-prefill of the check
        lens = (*[longest] * options.batch_size, max(1, options.shared_prefix_len), again)
        return Needs(lens, max(again, options.batch_size * options.chunk_size))

    def prepare(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts = read_prompts(self.options, self.encode)
        if self.config.model.path is not None:
            engine.notes.append(
                "text as bytes: no tokenizer.json" if self.encode is None else "text by tokenizer.json"
            )
        self.requests: list[CachedRequest] = []
        self.generated: list[list[int]] = []
        longest = self.options.prompt_len + self.most_steps
        self.decoder = engine.decoder(self.options.batch_size, longest)

    def units(self) -> list[Unit]:
        size, steps = self.options.batch_size, int(self.options.steps)
        return [
            Unit(
                "prefill", self._prefill, size * self.options.prompt_len, min(5, self.config.measure.repeats)
            ),
            Unit("decode_step", self.decoder.step, size, steps, host_time=True, reset=self._restart),
        ]

    def _prefill(self) -> Tensor | None:
        """All prompts from nothing; logits [B, X] of their last tokens (None for the attention path alone, where
        nothing is sampled). Decoding starts where it ends."""
        for request in self.requests:
            self.engine.cache.close(request)
        runner, options = self.engine.runner, self.options
        self.requests = []
        shared = self.prompts[0][: options.shared_prefix_len]
        if shared:
            parent = self.engine.cache.open()
            runner.extend_in_chunks([parent], [shared], options.chunk_size)
            self.requests = [self.engine.cache.fork(parent, len(shared)) for _ in self.prompts]
            self.engine.cache.close(parent)
        else:
            self.requests = [self.engine.cache.open() for _ in self.prompts]
        rest = [prompt[r.seq_len :] for r, prompt in zip(self.requests, self.prompts, strict=True)]
        logits = runner.extend_in_chunks(self.requests, rest, options.chunk_size)
        self.first_tokens = torch.zeros(len(self.requests)) if logits is None else logits.argmax(-1)
        self.decoder.start(self.requests, self.first_tokens)
        return logits

    def _restart(self) -> None:
        self.restart([self.options.prompt_len] * len(self.requests), self.first_tokens)

    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        """The prompts and `steps` greedy tokens; every token's logits are kept for the checked requests."""
        first = self._prefill()
        prefilled = self._last_prefill_pass()
        if first is None:
            for _ in range(self.options.steps):
                self.decoder.step()
            return [prefilled, self.current_pass()], []
        chosen = pick(len(self.requests), self.config.measure.check_requests)
        logits, tokens = [first[chosen]], [first.argmax(-1).tolist()]
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
        return Case(self.requests[index].row, 0, torch.tensor(tokens), at, logits_MX)

    def _last_prefill_pass(self) -> Pass:
        """The prompts' last chunks; all prompts are as long and share as much."""
        size, prompt_len = len(self.requests), int(self.options.prompt_len)
        shared_slots = (
            int(self.options.shared_prefix_len) // self.engine.cache.page_size * self.engine.cache.page_size
        )
        last = (prompt_len - shared_slots - 1) % int(self.options.chunk_size) + 1
        rows = [request.row for request in self.requests]
        return Pass(rows, [prompt_len] * size, [last] * size, last * size, ForwardMode.EXTEND)


def read_prompts(options: TextWorkload, encode: Encode | None = None) -> list[list[int]]:
    """`batch_size` prompts of `prompt_len` tokens: the text's first `shared_prefix_len`, then passages from all
    over it (given `encode`, over as much of its beginning as needed). Raises ConfigError for a missing or too short
    text."""
    text, source = _read_text(options.path)
    shared_len, prompt_len = options.shared_prefix_len, options.prompt_len
    count = options.batch_size
    own_len = prompt_len - shared_len
    needed = shared_len + count * own_len
    tokens = text if encode is None else encode(text[: needed * _BYTES_PER_TOKEN])
    if len(tokens) < needed:
        raise ConfigError(
            f"workload.path={source} holds {len(tokens)} {'bytes' if encode is None else 'tokens'}, {count} prompts of "
            f"workload.prompt_len={prompt_len} with workload.shared_prefix_len={shared_len} need {needed}; "
            "give a longer text"
        )
    stride = (len(tokens) - shared_len) // count
    starts = [shared_len + i * stride for i in range(count)]
    return [[*tokens[:shared_len], *tokens[start : start + own_len]] for start in starts]


def _read_text(path: str | None) -> tuple[bytes, str]:
    root = Path(path).expanduser() if path is not None else Path(os.__file__).parent
    if not root.exists():
        raise ConfigError(f"workload.path={path} does not exist; give a text file or a folder of text files")
    if root.is_file():
        return _read(root), str(root)
    # Sorted, and only the folder's own files: the same text on every run of the same machine.
    files = sorted(root.glob("*.py")) if path is None else sorted(f for f in root.iterdir() if f.is_file())
    return b"".join(_read(file) for file in files), str(root)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"workload.path={file} cannot be read: {error.strerror}") from error
