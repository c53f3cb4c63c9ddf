"""Which text `workload=text` reads, how it is cut into passages, and what it says when a text will not do."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fa_research.config import TextWorkload
from fa_research.errors import ConfigError
from fa_research.models.tokenizer import ByteTokenizer, TextStream, Tokenizer, Tokens
from fa_research.workloads.corpus import Passage, read_passages, read_text
from fa_research.workloads.heldout import is_held_out
from tests.workloads.cells import text_file

OPTIONS = TextWorkload(batch_size=4, prompt_len=60, shared_prefix_len=40, chunk_size=13, steps=3)


class FrontedBytes(ByteTokenizer):
    """Bytes that begin with tokens of their own."""

    def __init__(self, *front: int) -> None:
        super().__init__()
        self.leading_ids = list(front)


def passages_from(path: Path | None, tokenizer: Tokenizer | None = None, **changes: object) -> list[Passage]:
    options = dataclasses.replace(OPTIONS, path=None if path is None else str(path), **changes)  # type: ignore[arg-type]
    return read_passages(options, tokenizer or ByteTokenizer())


def prompts_from(path: Path | None, **changes: object) -> list[list[int]]:
    return [passage.prompt for passage in passages_from(path, **changes)]  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [0, 1, 40, 59])
def test_prompts_share_their_prefix_and_nothing_else(tmp_path: Path, shared: int) -> None:
    prompts = prompts_from(text_file(tmp_path), shared_prefix_len=shared)
    assert [len(prompt) for prompt in prompts] == [60] * 4
    text = text_file(tmp_path).read_bytes()
    assert all(bytes(prompt[:shared]) == text[:shared] for prompt in prompts)
    own = [bytes(prompt[shared:]) for prompt in prompts]
    assert all(part in text[shared:] for part in own)
    if shared < 59:
        assert len(set(own)) == 4
    assert prompts == prompts_from(text_file(tmp_path), shared_prefix_len=shared)


def test_default_is_what_the_shipped_model_never_saw() -> None:
    """Held-out files of the standard library in the order of their paths, nothing else."""
    library = Path(os.__file__).parent
    text, source = read_text(None)
    rest = text
    for path in sorted(file.relative_to(library).as_posix() for file in library.rglob("*.py")):
        content = (library / path).read_bytes()
        if is_held_out(path) and rest.startswith(content):
            rest = rest[len(content) :]
        elif is_held_out(path):
            assert b"\0" in content or not _decodes(content)
    assert rest == b"" and len(text) > 100_000 and str(library) in source
    prompts = prompts_from(None)
    assert prompts == prompts_from(None) and len({tuple(prompt) for prompt in prompts}) == 4


def _decodes(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_folder_is_read_in_order_without_what_is_below_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"b" * 100)
    (tmp_path / "a.txt").write_bytes(b"a" * 41)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "deeper.txt").write_bytes(b"c" * 10_000)
    prompts = prompts_from(tmp_path)
    assert bytes(prompts[0]) == b"a" * 41 + b"b" * 19
    assert bytes(prompts[3]) == b"a" * 40 + b"b" * 20


def test_what_follows_a_prompt_follows_it_in_the_text(tmp_path: Path) -> None:
    text = text_file(tmp_path).read_bytes()
    for passage in passages_from(tmp_path / "text.txt"):
        assert len(passage.continuation) == 4 and passage.tokens == passage.prompt + passage.continuation
        assert bytes(passage.tokens[40:]) in text
        assert passage.num_bytes == [1] * 64


@pytest.mark.parametrize(("shared", "common"), [(0, 2), (1, 2), (2, 2), (3, 3), (40, 40)])
def test_every_prompt_begins_with_the_tokens_of_the_tokenizer(
    tmp_path: Path, shared: int, common: int
) -> None:
    """They are of the prompt's length and of the shared prefix, and stand for no bytes."""
    text = text_file(tmp_path).read_bytes()
    passages = passages_from(tmp_path / "text.txt", FrontedBytes(300, 301), shared_prefix_len=shared)
    for passage in passages:
        assert len(passage.prompt) == 60 and passage.prompt[:2] == [300, 301]
        assert bytes(passage.tokens[2:common]) == text[: common - 2]
        assert bytes(passage.tokens[common:]) in text
        assert passage.num_bytes == [0, 0] + [1] * 62
    assert len({bytes(passage.prompt[common:]) for passage in passages}) == 4
    with pytest.raises(ConfigError, match="workload.prompt_len=1: must be at least 2"):
        passages_from(tmp_path / "text.txt", FrontedBytes(1, 2), prompt_len=1, shared_prefix_len=0)


class Long:
    """A token for every hundred bytes; keeps what it is asked to encode."""

    name = "long"
    leading_ids: list[int] = []
    eos: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def encode(self, text: bytes) -> Tokens:
        self.asked.append(text)
        return Tokens([1] * (len(text) // 100), [100] * (len(text) // 100))

    def stream(self) -> TextStream:
        raise NotImplementedError


def test_a_long_text_is_encoded_as_far_as_needed_and_in_whole_characters(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" + "é" * 10**6)
    tokenizer = Long()
    passages_from(tmp_path / "long.txt", tokenizer)
    assert [len(text) for text in tokenizer.asked] == [136 * size - 1 for size in (16, 64, 256)]
    assert tokenizer.asked[0].decode() == "x" + "é" * (136 * 8 - 1)


@pytest.mark.parametrize(
    ("content", "where"),
    [(b"text\0more", "0x00 at 4"), (b"caf\xe9 latin", "0xe9 at 3"), (b"\x89PNG\r\n", "0x89 at 0")],
)
def test_a_binary_file_is_named(tmp_path: Path, content: bytes, where: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(content)
    for path in (tmp_path, tmp_path / "picture.png"):
        with pytest.raises(
            ConfigError, match=rf"picture.png is not UTF-8 text \(byte {where}\); give text files"
        ):
            read_text(str(path))


def test_a_text_that_is_just_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    text = text_file(tmp_path).read_bytes()
    path.write_bytes(text[:136])
    passages = passages_from(path)
    assert [bytes(passage.prompt[40:]) for passage in passages] == [
        text[i : i + 20] for i in (40, 64, 88, 112)
    ]
    assert bytes(passages[-1].continuation) == text[132:136]
    path.write_bytes(text[:135])
    with pytest.raises(
        ConfigError, match=r"short.txt holds 135 bytes.*steps=3 \+ 1.*need 136; give a longer text"
    ):
        prompts_from(path)


def test_an_empty_folder_and_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 0 bytes"):
        prompts_from(tmp_path)
    missing = tmp_path / "nowhere.txt"
    with pytest.raises(ConfigError, match=r"workload.path=.*nowhere.txt does not exist; give a text file or"):
        prompts_from(missing)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loop.txt"
    path.symlink_to(path)
    with pytest.raises(ConfigError, match="loop.txt"):
        prompts_from(path)
