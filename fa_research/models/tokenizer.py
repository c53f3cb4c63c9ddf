"""Text as the tokens of a model and back: a checkpoint's tokenizer.json through the `tokenizers` library, or bytes. No
chat templates."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any, Protocol

from fa_research.config import ModelConfig, checkpoint_folder
from fa_research.errors import CheckpointError, ConfigError

TOKENIZER = "tokenizer.json"
_BYTE_VALUES = 256
_REPLACEMENT = "\ufffd"  # what cannot be decoded


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, and how many bytes of UTF-8 text each stands for. Sums over a slice are exact, but for a character cut
    into several tokens, which counts with the first of them (as a blank that is put before a text counts as the text's
    first character)."""

    ids: Sequence[int]
    num_bytes: Sequence[int]


class TextStream(Protocol):
    """Tokens to text as they come: whole characters only, so that nothing is taken back."""

    def put(self, token: int) -> str:
        """The text that is certain with this token; empty inside a character."""
        ...

    def end(self) -> str:
        """What is left, incomplete characters replaced."""
        ...


class Tokenizer(Protocol):
    """name: for the row. leading_ids: ids before every text (BOS), as transformers' AutoTokenizer puts them; they stand
    for no bytes. eos: ids that end a text."""

    name: str
    leading_ids: list[int]
    eos: frozenset[int]

    def encode(self, text: bytes) -> Tokens:
        """The tokens of UTF-8 text, without `leading_ids` and without an end."""
        ...

    def stream(self) -> TextStream:
        """A new stream, for one text from its start."""
        ...


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """That of the folder `config.path`; bytes where there is no folder, or no tokenizer.json in it.

    Raises:
        CheckpointError: `tokenizers` is not installed, or a file is broken; later, for a token that does not fit
            `config.vocab_size`.
        ConfigError: bytes, and a vocabulary that has no room for them.
    """
    eos = frozenset[int]()
    if config.path is not None:
        folder = checkpoint_folder(config.path)
        eos = _eos(folder)
        if (folder / TOKENIZER).exists():
            return FileTokenizer(folder / TOKENIZER, config.vocab_size, eos)
    if config.vocab_size < _BYTE_VALUES:
        raise ConfigError(
            f"workload=text uses byte tokens: model.vocab_size={config.vocab_size} must be at least {_BYTE_VALUES}"
        )
    return ByteTokenizer(eos)


def _eos(folder: Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, or else of config.json: one id, several or none. A
    generation_config.json that names none leaves it to config.json here; in transformers 5.23 nothing then ends a text.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            raw = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model.path: {folder / name} cannot be read: {error}") from error
        found = raw.get("eos_token_id") if isinstance(raw, dict) else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if any(type(token) is not int for token in ids):  # true is no id
                raise CheckpointError(
                    f"model.path: {folder / name}: eos_token_id={json.dumps(found)}: expected a token id, a list of "
                    "ids or null"
                )
            return frozenset(ids)
    return frozenset()


class ByteTokenizer:
    """Every byte is a token; what a larger vocabulary has beyond 255 is no text."""

    name = "bytes"

    def __init__(self, eos: frozenset[int] = frozenset()) -> None:
        self.leading_ids: list[int] = []
        self.eos = eos

    def encode(self, text: bytes) -> Tokens:
        return Tokens(text, b"\x01" * len(text))  # not lists: a text may be large

    def stream(self) -> TextStream:
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: int) -> str:
        # 0xff is in no UTF-8 text: it ends what is incomplete and shows as a character that cannot be decoded
        return self._decoder.decode(bytes([min(token, _BYTE_VALUES - 1)]))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A tokenizer.json. What goes before a text is what its post-processor says, and nothing else: transformers ignores
    `add_bos_token` of tokenizer_config.json where there is a tokenizer.json."""

    name = TOKENIZER

    def __init__(self, file: Path, vocab_size: int, eos: frozenset[int] = frozenset()) -> None:
        self._file, self._vocab_size = file, vocab_size
        self._tokenizer = _read(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        sample = self._tokenizer.encode("a")
        is_front = takewhile(lambda pair: pair[1], zip(sample.ids, sample.special_tokens_mask, strict=True))
        self.leading_ids: list[int] = self._checked([token for token, _ in is_front])
        self.eos = eos

    def encode(self, text: bytes) -> Tokens:
        characters = text.decode(errors="replace")
        encoding = self._tokenizer.encode(characters, add_special_tokens=False)
        # Offsets are in characters, and may leave out blanks or overlap: a token's bytes are those up to its end that
        # no token before it had.
        before: Sequence[int] = range(len(text) + 1)
        if not text.isascii():
            before = [0, *accumulate(len(character.encode()) for character in characters)]
        ends = accumulate((before[end] for _, end in encoding.offsets), max, initial=0)
        return Tokens(self._checked(encoding.ids), [b - a for a, b in pairwise(ends)])

    def stream(self) -> TextStream:
        return _FileStream(self._tokenizer)

    def _checked(self, ids: list[int]) -> list[int]:
        if (highest := max(ids, default=0)) >= self._vocab_size:
            raise CheckpointError(
                f"model.path: {self._file} gives token {highest}, the model's vocabulary has {self._vocab_size}"
            )
        return ids


class _FileStream:
    """A token's text depends on its neighbours, so the few last ones are decoded with and without the new one, and the
    difference is new, unless it ends inside a character (as vLLM's incremental detokenizer does)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # those before `_read` are there for what follows them
        self._read = 0

    def put(self, token: int) -> str:
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._tokens, self._read = self._tokens[self._read :], len(self._tokens) - self._read
        return new

    def end(self) -> str:
        new = self._new()
        self._tokens, self._read = [], 0
        return new

    def _new(self) -> str:
        old = self._decode(self._tokens[: self._read])
        return self._decode(self._tokens)[len(old) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _read(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise CheckpointError(
            f"model.path: {file} needs the package tokenizers, which cannot be imported ({error}); "
            'it comes with the extra hf: pip install -e ".[hf]"'
        ) from error
    try:
        return Library.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"model.path: {file} is no tokenizer: {error}") from error
