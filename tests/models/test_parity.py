"""Checkpoints as transformers saves them, loaded by us, give the logits and the tokens of transformers: in one pass, in
odd chunks, and token by token over a paged cache full of NaN. Prompts pass windows and the original length of RoPE."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.config import Activation, GraphMode, RopeType
from fa_research.measure.numerics import judge
from fa_research.models import Decoder
from tests.engine.lab import (
    EAGER,
    FA2,
    FA3,
    INTERPRETED,
    PADDED,
    TRITON,
    Decoded,
    Lab,
    Place,
    decode,
    prompts_of,
)
from tests.engine.test_decode_equals_prefill import CONTEXT, LENS, STEPS, incremental
from tests.models.checkpoints import PEERS, ROPE_LEN, WINDOW, Peer, load, save

# Of float32 logits with a standard deviation above 1. Where theirs has two likeliest tokens nearer than twice this,
# either may be chosen: on the CPU there are none.
TOLERANCE = {"cpu": 2e-4, "cuda": 1e-3}
LONGEST = {"cpu": ROPE_LEN, "cuda": max(LENS["cuda"]) + STEPS["cuda"]}
PAGE_SIZES = (1, 16, 128)
TRITON_32 = Place("cuda", "triton", torch.float32, GraphMode.on)
BFLOAT16 = Place("cpu", "torch", torch.bfloat16, GraphMode.simulate)


@dataclass(frozen=True)
class Pair:
    """The same checkpoint on both sides: theirs in float32, ours, and theirs in the dtype of ours."""

    peer: Peer
    theirs: torch.nn.Module
    ours: Decoder
    low: torch.nn.Module
    device: str = "cpu"

    @torch.no_grad()
    def expected(self, sequence: list[int], model: torch.nn.Module | None = None) -> Tensor:
        """Their logits [T, X] of a whole sequence. A rotation that depends on the length is that of the longest one:
        tokens are appended, which those before do not see."""
        filler = [1] * (LONGEST[self.device] - len(sequence)) if self.peer.by_length else []
        ids = torch.tensor([sequence + filler], device=self.device)
        logits: Tensor = (model or self.theirs)(ids).logits[0, : len(sequence)]
        assert logits.std() > 1
        return logits

    def check(self, result: Decoded) -> None:
        """Logits, and with them each token as their greedy choice after the tokens before it."""
        atol = TOLERANCE[self.device]
        for sequence, logits in zip(result.sequences, result.logits, strict=True):
            expected = self.expected(sequence[:-1])[-len(logits) :]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=atol)
            best = expected.topk(2).values
            clear = (best[:, 0] - best[:, 1] > 2 * atol).cpu()
            chosen = torch.tensor(sequence[-len(logits) :])
            assert torch.equal(chosen[clear], expected.argmax(-1).cpu()[clear])
            assert clear.float().mean() > (0.9 if self.device == "cuda" else 0.999)

    def judge(self, result: Decoded) -> None:
        """In 16 bit: errors against float32 at most twice those of transformers in the same dtype. A mixture's largest
        errors are those of tokens near the border between two experts, for each side other tokens; so there the median
        token is judged, which a wrong weight or a wrong expert moves as well."""
        triples = []
        for sequence, logits in zip(result.sequences, result.logits, strict=True):
            models = (self.low, self.theirs)
            baseline, exact = (self.expected(sequence[:-1], model)[-len(logits) :] for model in models)
            triples.append((logits, baseline, exact))
        ours, low, exact_TX = (torch.cat(column).double() for column in zip(*triples, strict=True))
        error, baseline_error = (
            ((x - exact_TX).norm(dim=-1) / exact_TX.norm(dim=-1)).median() for x in (ours, low)
        )
        assert error <= 2 * baseline_error + 2e-3, (error, baseline_error)
        verdict = judge(triples)
        assert verdict.passed or self.peer.is_moe, verdict


def make_pair(name: str, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pair:
    save(PEERS[name], folder, dtype)
    theirs, low = (PEERS[name].open(folder, each, device) for each in (torch.float32, dtype))
    return Pair(PEERS[name], theirs, load(folder, dtype, device, LONGEST[device]), low, device)


@pytest.fixture(scope="module", params=PEERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


def test_one_prefill(pair: Pair) -> None:
    lab = Lab(EAGER, loaded=pair.ours)
    for prompt in prompts_of(3 * WINDOW + 5, WINDOW, 1):
        torch.testing.assert_close(lab.again(prompt), pair.expected(prompt), rtol=1e-4, atol=TOLERANCE["cpu"])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_odd_chunks_then_decoding_in_a_ragged_batch(pair: Pair, page_size: int) -> None:
    """Chunks of 7, 1 and 11 tokens; decoding starts before, at and past the window and passes it."""
    result = incremental(Lab(PADDED, page_size, loaded=pair.ours))
    assert len({tuple(sequence[-8:]) for sequence in result.sequences}) > 1
    pair.check(result)


def test_prefill_and_decoding_without_static_buffers(pair: Pair) -> None:
    lab = Lab(EAGER, page_size=4, loaded=pair.ours)
    prompts = prompts_of(2, 31, WINDOW - 1, seed=2)
    requests, first = lab.prefill(prompts)
    pair.check(decode(lab.decoder(4), requests, prompts, first, steps=18))


def test_greedy_text_is_what_generate_writes(pair: Pair) -> None:
    if pair.peer.by_length:
        pytest.skip("transformers keeps keys that were rotated for shorter sequences")
    lab = Lab(PADDED, loaded=pair.ours)
    prompts = prompts_of(23, 4, seed=3)
    requests, first = lab.prefill(prompts)
    result = decode(lab.decoder(2), requests, prompts, first, steps=23)
    for prompt, sequence in zip(prompts, result.sequences, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        assert sequence == pair.theirs.generate(ids, **options)[0].tolist()
        # A tied head tends to say again what it was told, the more so after a scaled embedding.
        assert len(set(sequence[len(prompt) :])) > 3 or pair.ours.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "page_size"), [("gptoss", 1), ("gemma2", 16), ("phi3-short", 16), ("mistral", 128)]
)
def test_interpreted_kernels(name: str, page_size: int, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path)
    lab = Lab(INTERPRETED, page_size, loaded=pair.ours)
    prompts = prompts_of(WINDOW + 2, 3)
    requests, first = lab.prefill(prompts)
    pair.check(decode(lab.decoder(2), requests, prompts, first, steps=2))


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gptoss"])
def test_bfloat16_errs_no_more_than_transformers(name: str, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path, torch.bfloat16)
    pair.judge(incremental(Lab(BFLOAT16, loaded=pair.ours)))


# A model -> a key of its config, and a value with which the logits must be wrong: the tests above would see it.
MATTERS: list[tuple[str, str, Any]] = [
    ("mistral", "mask.size", WINDOW + 1),
    ("mixtral", "mask.size", WINDOW - 1),
    ("ministral", "local.mask.size", WINDOW + 1),
    ("ministral", "local.pattern", [True]),
    ("qwen2-window", "local.mask.size", WINDOW + 1),
    ("gemma2", "local.mask.size", WINDOW - 1),
    ("gemma3", "local.mask.size", WINDOW + 1),
    ("gptoss", "local.mask.size", WINDOW + 1),
    ("gemma2", "local.pattern", [False, True]),
    ("gemma3", "local.rope_theta", None),
    ("gemma3", "rope_scaling.factor", 7.0),
    ("gemma2", "softcap", 0.0),
    ("gemma2", "logit_softcap", 0.0),
    ("gemma2", "embedding_scale", 12.0),
    ("gemma2", "attention_scale", None),
    ("gemma2", "activation", Activation.silu),
    ("gemma2", "post_norms", False),
    ("gemma3", "qk_norm", False),
    ("qwen3", "qk_norm", False),
    ("qwen3", "rms_norm_eps", 1e-1),
    ("qwen2", "qkv_bias", False),
    ("llama-biases", "o_bias", False),
    ("gptoss", "o_bias", False),
    ("gptoss", "sink", False),
    ("gptoss", "activation", Activation.silu),
    ("gptoss", "moe.bias", False),
    ("mixtral", "moe.experts_per_token", 1),
    ("qwen3moe", "moe.norm_topk_prob", True),
    ("llama", "rope_scaling.type", RopeType.none),
    ("llama-linear", "rope_scaling.type", RopeType.none),
    ("llama-dynamic", "rope_scaling.original_max_position", ROPE_LEN),
    ("llama-yarn", "rope_scaling.attention_factor", 1.0),
    ("llama-yarn", "rope_scaling.factor", 1.0),
    ("gptoss", "rope_scaling.truncate", True),
    ("phi3-long", "rope_scaling.original_max_position", ROPE_LEN),
    ("phi3-short", "rope_scaling.original_max_position", ROPE_LEN - 1),
]


@pytest.mark.parametrize(("name", "key", "value"), MATTERS, ids=[f"{name}-{key}" for name, key, _ in MATTERS])
def test_these_tests_would_see_a_wrong(name: str, key: str, value: Any, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path)
    config = copy.deepcopy(pair.ours.config)
    *groups, field = key.split(".")
    group: Any = config
    for step in groups:
        group = getattr(group, step)
    assert getattr(group, field) != value
    setattr(group, field, value)
    wrong = Decoder(config, dtype=torch.float32, device="cpu", rope_len=ROPE_LEN)
    wrong.load_state_dict(pair.ours.state_dict(), strict=False)
    (prompt,) = prompts_of(3 * WINDOW + 5)
    difference = (Lab(EAGER, loaded=wrong).again(prompt) - pair.expected(prompt)).abs()
    assert difference.max() > 100 * TOLERANCE["cpu"]


# On the GPU: longer prompts, captured decode steps, the kernels that are really used.


@pytest.fixture(scope="module", params=PEERS)
def on_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param), device="cuda")


@pytest.fixture(scope="module", params=PEERS)
def in_bfloat16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_float32_on_the_gpu_token_for_token(on_gpu: Pair, page_size: int) -> None:
    lab = Lab(TRITON_32, page_size, loaded=on_gpu.ours, max_context_len=CONTEXT["cuda"])
    on_gpu.check(incremental(lab))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("place", [FA3, FA2, TRITON], ids=str)
def test_bfloat16_on_the_gpu(in_bfloat16: Pair, place: Place, page_size: int) -> None:
    lab = Lab(place, page_size, loaded=in_bfloat16.ours, max_context_len=CONTEXT["cuda"])
    in_bfloat16.judge(incremental(lab))
