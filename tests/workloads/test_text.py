"""`workload=text`: which text it reads, how prompts share their prefix, and what it says when the text will not do."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fa_research.config import TextWorkload
from fa_research.errors import ConfigError
from fa_research.workloads.text import Text, read_prompts
from tests.workloads.cells import cell, model_config, prepared, text_file

OPTIONS = TextWorkload(batch_size=4, prompt_len=60, shared_prefix_len=40, chunk_size=13, steps=3)


def prompts_from(path: Path | None, **changes: object) -> list[list[int]]:
    return read_prompts(dataclasses.replace(OPTIONS, path=None if path is None else str(path), **changes))  # type: ignore[arg-type]


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


def test_default_is_the_standard_library_itself() -> None:
    prompts = prompts_from(None)
    first = sorted(Path(os.__file__).parent.glob("*.py"))[0].read_bytes()
    assert bytes(prompts[0][:40]) == first[:40]
    assert prompts == prompts_from(None)
    assert len({tuple(prompt) for prompt in prompts}) == 4


def test_a_folder_is_read_in_order_without_what_is_below_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"b" * 100)
    (tmp_path / "a.txt").write_bytes(b"a" * 41)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "deeper.txt").write_bytes(b"c" * 10_000)
    prompts = prompts_from(tmp_path)
    assert bytes(prompts[0]) == b"a" * 41 + b"b" * 19
    assert bytes(prompts[3]) == b"a" * 40 + b"b" * 20


def test_a_text_that_is_just_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(range(120)))
    assert [prompt[-1] for prompt in prompts_from(path)] == [59, 79, 99, 119]
    path.write_bytes(bytes(range(119)))
    with pytest.raises(ConfigError, match=r"short.txt holds 119 bytes.*need 120; give a longer text"):
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


def test_byte_tokens_need_a_vocabulary_for_bytes() -> None:
    with pytest.raises(ConfigError, match="model.vocab_size=255 must be at least 256"):
        Text(cell("text", model=model_config(vocab_size=255))).needs()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_the_prefix_is_in_the_cache_once(page_size: int) -> None:
    """Full pages of the shared prefix are held by every prompt; the parent has left."""
    workload, engine = prepared(cell("text", page_size=page_size))
    assert isinstance(workload, Text)
    workload._prefill()
    shared = 35 // page_size
    allocator = engine.cache.allocator
    for request in workload.requests:
        assert request.pages[:shared] == workload.requests[0].pages[:shared]
        assert all(allocator.references(page) == 3 for page in request.pages[:shared])
        assert all(allocator.references(page) == 1 for page in request.pages[shared:])
        assert request.seq_len == 43
    each = -(-43 // page_size)
    assert allocator.pages_used == 3 * each - 2 * shared
    workload._prefill()  # closes the requests of the last one
    assert allocator.pages_used == 3 * each - 2 * shared


def test_what_was_generated_is_kept(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, path=str(text_file(tmp_path)), steps=6)
    workload, _ = prepared(cell(options))
    assert isinstance(workload, Text)
    (_, done), cases = workload.checked_passes()
    assert [len(tokens) for tokens in workload.generated] == [6] * 4
    assert done.seq_lens == [60 + 5] * 4
    assert len(cases) == 2
    for case, i in zip(cases, (0, 3), strict=True):
        assert case.row == workload.requests[i].row and case.prefix_len == 0
        assert case.tokens_T.tolist() == workload.prompts[i] + workload.generated[i][:-1]
        assert case.at_M.tolist() == list(range(59, 65))
        assert case.logits_MX.argmax(-1).tolist() == workload.generated[i]
