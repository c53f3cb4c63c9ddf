"""`workload=text`: how prompts share their prefix in the cache, and what is kept of decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fa_research.config import TextWorkload
from fa_research.errors import ConfigError
from fa_research.workloads.text import Text
from tests.workloads.cells import cell, model_config, prepared, text_file

OPTIONS = TextWorkload(batch_size=4, prompt_len=60, shared_prefix_len=40, chunk_size=13, steps=3)


def test_byte_tokens_need_a_vocabulary_for_bytes() -> None:
    with pytest.raises(ConfigError, match="model.vocab_size=255 must be at least 256"):
        Text(cell("text", model=model_config(vocab_size=255))).needs()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_the_prefix_is_in_the_cache_once(page_size: int) -> None:
    """Full pages of the shared prefix are held by every prompt; the parent has left."""
    workload, engine = prepared(cell("text", page_size=page_size))
    assert isinstance(workload, Text)
    workload.prefill()
    shared = 35 // page_size
    allocator = engine.cache.allocator
    for request in workload.requests:
        assert request.pages[:shared] == workload.requests[0].pages[:shared]
        assert all(allocator.references(page) == 3 for page in request.pages[:shared])
        assert all(allocator.references(page) == 1 for page in request.pages[shared:])
        assert request.seq_len == 43
    each = -(-43 // page_size)
    assert allocator.pages_used == 3 * each - 2 * shared
    workload.prefill()  # closes the requests of the last one
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
