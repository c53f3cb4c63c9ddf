"""Real text for `workload=text`: a file, a folder or the Python standard library, cut into passages of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fa_research.config import TextWorkload
from fa_research.errors import ConfigError
from fa_research.models.tokenizer import ByteTokenizer, Tokenizer, Tokens
from fa_research.workloads.heldout import is_held_out

_BYTES_PER_TOKEN = 16  # more than most text has: what is encoded of a long text at first


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt, and `steps` + 1 tokens of the text that follow it; `num_bytes` for each token of both."""

    prompt: list[int]
    continuation: list[int]
    num_bytes: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.continuation


def read_passages(options: TextWorkload, tokenizer: Tokenizer) -> list[Passage]:
    """`batch_size` passages. Each begins with the tokenizer's `leading_ids` and the text's beginning,
    `shared_prefix_len` tokens in all. What follows comes from places all over the text (of a long text, over as much
    of its beginning as is encoded).

    Raises:
        ConfigError: a text that is missing, binary or too short, or prompts that are shorter than `leading_ids`.
    """
    text, source = read_text(options.path)
    count, prompt_len, front = options.batch_size, options.prompt_len, tokenizer.leading_ids
    if prompt_len < len(front):
        raise ConfigError(
            f"workload.prompt_len={prompt_len}: must be at least {len(front)}, which the tokenizer puts before a text"
        )
    shared_len = max(0, options.shared_prefix_len - len(front))
    own_len = prompt_len - len(front) - shared_len + options.steps + 1
    needed = shared_len + count * own_len
    tokens = _encode(text, tokenizer, needed)
    if len(tokens.ids) < needed:
        unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokens"
        raise ConfigError(
            f"workload.path={source} holds {len(tokens.ids)} {unit}, "
            f"{count} prompts of workload.prompt_len={prompt_len} with workload.shared_prefix_len="
            f"{options.shared_prefix_len} and the workload.steps={options.steps} + 1 tokens after each need {needed}; "
            "give a longer text"
        )
    stride = (len(tokens.ids) - shared_len) // count
    passages = []
    for start in range(shared_len, shared_len + count * stride, stride):
        shared, own = slice(shared_len), slice(start, start + own_len)
        ids = [*front, *tokens.ids[shared], *tokens.ids[own]]
        num_bytes = [*([0] * len(front)), *tokens.num_bytes[shared], *tokens.num_bytes[own]]
        passages.append(Passage(ids[:prompt_len], ids[prompt_len:], num_bytes))
    return passages


def _encode(text: bytes, tokenizer: Tokenizer, needed: int) -> Tokens:
    """All bytes, or at least `needed` tokens of the text's beginning where there are so many."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text)
    size = needed * _BYTES_PER_TOKEN
    tokens = tokenizer.encode(_beginning(text, size))
    while len(tokens.ids) < needed and size < len(text):
        size *= 4
        tokens = tokenizer.encode(_beginning(text, size))
    return tokens


def _beginning(text: bytes, size: int) -> bytes:
    """Up to `size` bytes, whole characters."""
    while 0 < size < len(text) and text[size] & 0xC0 == 0x80:  # the next byte goes on with a character
        size -= 1
    return text[:size]


def read_text(path: str | None) -> tuple[bytes, str]:
    """The UTF-8 text of a file, of a folder's own files, or (None) of the standard library's held-out files; and where
    it is. Raises ConfigError for what is missing, unreadable or no text."""
    if path is None:
        library = Path(os.__file__).parent
        return b"".join(_held_out(library)), f"null (held-out files of {library})"
    root = Path(path).expanduser()
    if not os.path.exists(root):  # a name that is too long is none either
        raise ConfigError(f"workload.path={path} does not exist; give a text file or a folder of text files")
    if root.is_file():
        return _read(root), str(root)
    # Sorted, and only the folder's own files: the same text on every run of the same machine.
    return b"".join(_read(file) for file in sorted(root.iterdir()) if file.is_file()), str(root)


def _held_out(library: Path) -> Iterator[bytes]:
    """What the shipped model was not trained on, sorted by path; without the few files that test how Python reads what
    is not UTF-8."""
    paths: list[str] = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        paths += [(Path(folder) / file).relative_to(library).as_posix() for file in files]
    for path in sorted(filter(is_held_out, paths)):
        content = (library / path).read_bytes()
        if _not_text(content) is None:
            yield content


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"workload.path={file} cannot be read: {error.strerror}") from error
    if (wrong := _not_text(content)) is not None:
        raise ConfigError(
            f"workload.path={file} is not UTF-8 text (byte {content[wrong]:#04x} at {wrong}); give text files"
        )
    return content


def _not_text(content: bytes) -> int | None:
    """Where the first byte is that is in no text."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    zero = content.find(b"\0")
    return zero if zero >= 0 else None
