"""Sampling in the engine: the same tokens alone and in a batch, padded and exact, captured and eager, and after a
prefill as in a decode step; parameters out of range are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fa_research.config import Config, GraphMode, SamplingConfig
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.sampling import GREEDY, SamplingParams, sample, sampling_params
from fa_research.errors import ConfigError
from tests.engine.lab import EXACT, PADDED, TRITON, VOCABULARY, Lab, Place, places, prompts_of

# Hot, since the lab's model is sure of its tokens.
MIXTURE = [
    SamplingParams(3.0, top_p=0.9, seed=1),
    GREEDY,
    SamplingParams(4.0, top_k=5, seed=2),
    SamplingParams(5.0, 20, 0.95, 0.05, seed=2**62),
    SamplingParams(4.0, seed=1),
]
LENS = (21, 4, 33, 8, 5)
STEPS = 12


def runner(lab: Lab, *batch_sizes: int, mode: GraphMode | None = None, sampling: bool = True) -> DecodeRunner:
    decoder = DecodeRunner(
        lab.runner,
        mode=mode or lab.place.mode,
        batch_sizes=batch_sizes or (1, 2, 4, 8),
        max_seq_len_k=lab.max_context_len,
        reserve_ahead=5,
        sampling=sampling,
    )
    lab.cache.kv.poison([0])
    return decoder


def generate(
    lab: Lab, decoder: DecodeRunner, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | None
) -> list[list[int]]:
    """The new tokens of each prompt: one after the prefill, the rest by decode steps."""
    requests, logits = lab.prefill(prompts)
    chosen = [GREEDY] * len(prompts) if params is None else params
    first = sample(logits, chosen, [len(prompt) for prompt in prompts])
    decoder.start(requests, first, params)
    tokens = [first.tolist()]
    for _ in range(STEPS):
        decoder.step()
        tokens.append(decoder.reader.pop())
    decoder.flush()
    for request in requests:
        lab.cache.close(request)
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("place", places(EXACT, PADDED, TRITON))
def test_tokens_are_the_same_in_every_mode_and_batch(place: Place) -> None:
    """Captured or simulated, padded or not, alone or together, in any order: bit-equal logits give equal tokens, and
    rounding changes none here in float32."""
    lab = Lab(dataclasses.replace(place, dtype=torch.float32) if place.device == "cuda" else place)
    prompts = prompts_of(*LENS)
    together = generate(lab, runner(lab), prompts, MIXTURE)
    assert len({tuple(tokens) for tokens in together}) == len(LENS)
    assert all(0 <= token < VOCABULARY for tokens in together for token in tokens)
    assert generate(lab, runner(lab, mode=GraphMode.off), prompts, MIXTURE) == together
    assert generate(lab, runner(lab, 16), prompts[::-1], MIXTURE[::-1]) == together[::-1]
    one = runner(lab, 1)
    for prompt, params, tokens in zip(prompts, MIXTURE, together, strict=True):
        assert generate(lab, one, [prompt], [params]) == [tokens]


def test_a_request_of_a_batch_before_leaves_nothing_behind() -> None:
    """The same static buffers, first with sampled requests, then greedy ones, also without a word about sampling."""
    lab = Lab(EXACT)
    prompts = prompts_of(*LENS)
    decoder = runner(lab, 8)
    generate(lab, decoder, prompts, MIXTURE)
    assert decoder.state.temperature_B.tolist()[5:] == [0.0] * 3
    greedy = generate(lab, runner(lab, 8, sampling=False), prompts, None)
    assert generate(lab, decoder, prompts, None) == greedy
    assert generate(lab, decoder, prompts[:2], MIXTURE[:2])[1] == greedy[1]
    assert generate(lab, decoder, prompts[:2], MIXTURE[:2])[0] != greedy[0]


def test_a_decode_step_draws_what_a_prefill_would() -> None:
    """The same sequence up to the same position, computed as one prompt or as a prompt and a decoded token."""
    lab = Lab(EXACT, max_requests=10)
    prompts = prompts_of(*LENS)
    _, logits = lab.prefill(prompts)
    expected = sample(logits, MIXTURE, torch.tensor(LENS)).tolist()
    requests, _ = lab.prefill([prompt[:-1] for prompt in prompts])
    decoder = runner(lab)
    decoder.start(requests, [prompt[-1] for prompt in prompts], MIXTURE)
    decoder.step()
    assert decoder.reader.pop() == expected
    assert expected != logits.argmax(-1).tolist()


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same() -> None:
    lab = Lab(PADDED)
    prompts = [*prompts_of(21)] * 3
    params = [SamplingParams(1.5, seed=seed) for seed in (1, 2, 1)]
    first, other, again = generate(lab, runner(lab), prompts, params)
    assert first == again != other


def test_a_greedy_runner_refuses_requests_to_sample() -> None:
    lab = Lab(PADDED)
    requests, logits = lab.prefill(prompts_of(5, 7))
    decoder = runner(lab, sampling=False)
    with pytest.raises(ConfigError, match=r"sampling\.temperature=3\.0 for request 0.*sampling=True"):
        decoder.start(requests, logits.argmax(-1), MIXTURE[:2])
    with pytest.raises(ConfigError, match="sampling holds 1 requests' parameters, the batch has 2"):
        decoder.start(requests, logits.argmax(-1), [GREEDY])
    decoder.start(requests, logits.argmax(-1), [GREEDY, GREEDY])
    decoder.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, r"sampling\.temperature=-1\.0: must be 0 \(greedy\) or from"),
        ({"temperature": float("nan")}, r"sampling\.temperature=nan"),
        ({"temperature": float("inf")}, r"sampling\.temperature=inf"),
        ({"top_k": -1}, r"sampling\.top_k=-1: must be 0"),
        ({"top_p": 0.0}, r"sampling\.top_p=0\.0: must be above 0"),
        ({"top_p": 1.5}, r"sampling\.top_p=1\.5"),
        ({"min_p": 2.0}, r"sampling\.min_p=2\.0: must be from 0"),
        ({"seed": -1}, r"sampling\.seed=-1: must be from 0"),
        ({"top_k": -1, "min_p": -0.1}, r"sampling\.top_k=-1.*; sampling\.min_p=-0\.1"),
    ],
)
def test_values_out_of_range_name_their_key(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**given)  # type: ignore[arg-type]


def test_request_i_has_a_stream_of_its_own() -> None:
    config = Config(seed=5, sampling=SamplingConfig(0.5, 3, 0.9, 0.1))
    assert sampling_params(config, 3) == [SamplingParams(0.5, 3, 0.9, 0.1, seed) for seed in (5, 6, 7)]
    config.sampling.seed = 2**63 - 1
    assert [params.seed for params in sampling_params(config, 2)] == [2**63 - 1, 0]


def test_a_prefills_greedy_tokens_are_the_likeliest() -> None:
    logits_BX = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens: Tensor = sample(logits_BX, [GREEDY] * 3, [1, 2, 3])
    assert torch.equal(tokens, logits_BX.argmax(-1))
    mixed = sample(logits_BX, [GREEDY, SamplingParams(5.0, seed=3), GREEDY], [1, 2, 3])
    assert mixed[[0, 2]].tolist() == tokens[[0, 2]].tolist()
