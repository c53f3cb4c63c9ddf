"""Checkpoints as transformers saves them, loaded by us, give the logits and the tokens of transformers: in one pass, in
odd chunks, and token by token over a paged cache full of NaN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fa_research.models import Decoder
from tests.engine.lab import EAGER, INTERPRETED, PADDED, Decoded, Lab, Place, decode, prompts_of
from tests.engine.test_decode_equals_prefill import incremental
from tests.models.checkpoints import PEERS, WINDOW, load, save

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}  # of float32 logits with a standard deviation above 1


@dataclass(frozen=True)
class Pair:
    """The same checkpoint on both sides."""

    theirs: torch.nn.Module
    ours: Decoder

    @torch.no_grad()
    def expected(self, sequence: list[int]) -> Tensor:
        """Their logits [T, X] of a whole sequence."""
        logits: Tensor = self.theirs(torch.tensor([sequence])).logits[0]
        assert logits.std() > 1
        return logits

    def check(self, result: Decoded) -> None:
        """Logits, and with them each token as their greedy choice after the tokens before it."""
        for sequence, logits in zip(result.sequences, result.logits, strict=True):
            expected = self.expected(sequence[:-1])[-len(logits) :]
            torch.testing.assert_close(logits, expected, **TOLERANCE)
            assert expected.argmax(-1).tolist() == sequence[-len(logits) :]


@pytest.fixture(scope="module", params=PEERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return Pair(save(PEERS[request.param], folder), load(folder))


def test_one_prefill(pair: Pair) -> None:
    lab = Lab(EAGER, loaded=pair.ours)
    for prompt in prompts_of(3 * WINDOW + 5, WINDOW, 1):
        torch.testing.assert_close(lab.again(prompt), pair.expected(prompt), **TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_odd_chunks_then_decoding_in_a_ragged_batch(pair: Pair, page_size: int) -> None:
    """Chunks of 7, 1 and 11 tokens; decoding starts before, at and past the window and passes it."""
    result = incremental(Lab(PADDED, page_size, loaded=pair.ours))
    assert len({tuple(sequence[-8:]) for sequence in result.sequences}) > 1
    pair.check(result)


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_prefill_and_decoding_without_static_buffers(pair: Pair, page_size: int) -> None:
    lab = Lab(EAGER, page_size, loaded=pair.ours)
    prompts = prompts_of(2, 31, WINDOW - 1, seed=2)
    requests, first = lab.prefill(prompts)
    pair.check(decode(lab.decoder(4), requests, prompts, first, steps=18))


def test_greedy_text_is_what_generate_writes(pair: Pair) -> None:
    lab = Lab(PADDED, loaded=pair.ours)
    prompts = prompts_of(23, 4, seed=3)
    requests, first = lab.prefill(prompts)
    result = decode(lab.decoder(2), requests, prompts, first, steps=23)
    for prompt, sequence in zip(prompts, result.sequences, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        assert sequence == pair.theirs.generate(ids, **options)[0].tolist()
        assert len(set(sequence[len(prompt) :])) > 3


@pytest.mark.parametrize(("name", "page_size"), [("mistral", 1), ("qwen2", 16), ("qwen3", 128)])
def test_interpreted_kernels(name: str, page_size: int, tmp_path: Path) -> None:
    pair = Pair(save(PEERS[name], tmp_path), load(tmp_path))
    place: Place = INTERPRETED
    lab = Lab(place, page_size, loaded=pair.ours)
    prompts = prompts_of(WINDOW + 2, 3)
    requests, first = lab.prefill(prompts)
    pair.check(decode(lab.decoder(2), requests, prompts, first, steps=2))
