"""Text as the tokens of a checkpoint: its tokenizer.json, through the `tokenizers` library. No chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fa_research.config import ModelConfig, checkpoint_folder
from fa_research.errors import CheckpointError

TOKENIZER = "tokenizer.json"
Encode = Callable[[bytes], list[int]]


def load_tokenizer(config: ModelConfig) -> Encode | None:
    """What makes token ids of UTF-8 text, without the tokens that a tokenizer puts at the text's ends; None where there
    is no `model.path`, or no tokenizer.json in it.

    Raises:
        CheckpointError: `tokenizers` is not installed, or the file is broken; later, for a token that does not fit
            `config.vocab_size`.
    """
    file = checkpoint_folder(config.path) / TOKENIZER if config.path is not None else None
    if file is None or not file.exists():
        return None
    tokenizer = _read(file)

    def encode(text: bytes) -> list[int]:
        ids: list[int] = tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        if (highest := max(ids, default=0)) >= config.vocab_size:
            raise CheckpointError(
                f"model.path: {file} gives token {highest}, the model's vocabulary has {config.vocab_size}"
            )
        return ids

    return encode


def _read(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CheckpointError(
            f"model.path: {file} needs the package tokenizers, which cannot be imported ({error}); "
            'it comes with the extra hf: pip install -e ".[hf]"'
        ) from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"model.path: {file} is no tokenizer: {error}") from error
