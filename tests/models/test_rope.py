"""The rope table against transformers, for every type of scaling, and against exact angles far out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fa_research.config import RopeScaling, RopeType
from fa_research.models.rope import attention_factor, build_cos_sin, inverse_frequencies

NONE = RopeScaling()
LLAMA_3_1 = RopeScaling(RopeType.llama3)
LLAMA_3_2 = RopeScaling(RopeType.llama3, factor=32.0)
UNUSUAL = RopeScaling(
    RopeType.llama3, factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_position=1024
)
ORIGINAL = 512  # of the types below: lengths on both sides are compared
YARN = RopeScaling(RopeType.yarn, factor=16.0, original_max_position=ORIGINAL)
LONGROPE = RopeScaling(RopeType.longrope, factor=8.0, original_max_position=ORIGINAL)
SCALINGS = {
    "none": NONE,
    "linear": RopeScaling(RopeType.linear, factor=4.0),
    "dynamic": RopeScaling(RopeType.dynamic, factor=3.0, original_max_position=ORIGINAL),
    "llama3": RopeScaling(RopeType.llama3, factor=4.0, original_max_position=ORIGINAL),
    "yarn": YARN,
    "yarn-gpt-oss": dataclasses.replace(YARN, truncate=False),
    "yarn-betas": dataclasses.replace(YARN, beta_fast=20.0, beta_slow=2.5),
    "yarn-mscale": dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=1.2),
    "yarn-half-mscale": dataclasses.replace(YARN, mscale=0.707),
    "yarn-attention-factor": dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.2, attention_factor=1.3),
    "yarn-shrinking": dataclasses.replace(YARN, factor=0.5),
    "yarn-step": dataclasses.replace(YARN, original_max_position=6),
    "yarn-long": dataclasses.replace(YARN, original_max_position=10**9, beta_fast=1e6),
    "longrope": LONGROPE,
    "longrope-attention-factor": dataclasses.replace(LONGROPE, attention_factor=1.5),
    "longrope-shrinking": dataclasses.replace(LONGROPE, factor=0.5),
}
LENGTHS = [100, ORIGINAL, ORIGINAL + 1, 2000]


def with_factors(scaling: RopeScaling, head_dim: int) -> RopeScaling:
    """LongRoPE's lists, no two numbers alike."""
    pairs = range(head_dim // 2 if scaling.type is RopeType.longrope else 0)
    short, long = [1 + i / 50 for i in pairs], [1.2 + i / 3 for i in pairs]
    return dataclasses.replace(scaling, short_factor=short, long_factor=long)


def peer(head_dim: int, theta: float, scaling: RopeScaling) -> LlamaConfig:
    return LlamaConfig(
        head_dim=head_dim,
        rope_parameters=_parameters(theta, scaling),
        # the length that `dynamic` begins at
        max_position_embeddings=ORIGINAL if scaling.type is RopeType.dynamic else 131072,
    )


def _parameters(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    every = dataclasses.asdict(scaling) | {"original_max_position_embeddings": scaling.original_max_position}
    wanted = {
        RopeType.none: "",
        RopeType.linear: "factor",
        RopeType.dynamic: "factor",
        RopeType.llama3: "factor low_freq_factor high_freq_factor original_max_position_embeddings",
        RopeType.yarn: "factor beta_fast beta_slow truncate mscale mscale_all_dim attention_factor "
        "original_max_position_embeddings",
        RopeType.longrope: "factor short_factor long_factor attention_factor original_max_position_embeddings",
    }[scaling.type].split()
    given = {key: every[key] for key in wanted if every[key] is not None}
    name = "default" if scaling.type is RopeType.none else str(scaling.type)
    return {"rope_type": name, "rope_theta": theta, **given}


@pytest.mark.parametrize("head_dim", [64, 128, 256, 48])
@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2, UNUSUAL], ids=["3.1", "3.2", "unusual"])
def test_llama3_scaling_is_that_of_transformers(head_dim: int, scaling: RopeScaling) -> None:
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](peer(head_dim, 500000.0, scaling), "cpu")
    assert factor == 1.0
    actual = inverse_frequencies(head_dim, 500000.0, scaling)
    torch.testing.assert_close(actual, expected.double(), rtol=3e-6, atol=0)
    unscaled = inverse_frequencies(head_dim, 500000.0, NONE)
    assert actual[0] == unscaled[0]
    assert math.isclose(actual[-1], unscaled[-1] / scaling.factor)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("head_dim", [128, 48])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_frequencies_and_attention_factor_are_those_of_transformers(
    name: str, head_dim: int, length: int
) -> None:
    scaling = with_factors(SCALINGS[name], head_dim)
    config = peer(head_dim, 10000.0, scaling)
    expected, factor = ROPE_INIT_FUNCTIONS[str(scaling.type)](config, "cpu", seq_len=length)
    actual = inverse_frequencies(head_dim, 10000.0, scaling, rope_len=length)
    torch.testing.assert_close(actual, expected.double(), rtol=5e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_table_is_that_of_transformers(name: str, length: int) -> None:
    """Of a sequence of this length in one pass: transformers chooses by it, here `rope_len` says it."""
    scaling = with_factors(SCALINGS[name], 64)
    rotary = LlamaRotaryEmbedding(peer(64, 10000.0, scaling))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    table = build_cos_sin(2100, 64, 10000.0, scaling, rope_len=length)
    assert table.shape == (2100, 64)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:length, :32], cos[0, :, :32], rtol=0, atol=3e-4)
    torch.testing.assert_close(table[:length, 32:], sin[0, :, :32], rtol=0, atol=3e-4)
    assert torch.equal(
        build_cos_sin(length, 64, 10000.0, scaling), table[:length]
    )  # the default: all positions


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_short_and_long_sequences_turn_differently(name: str) -> None:
    scaling = with_factors(SCALINGS[name], 64)
    tables = [build_cos_sin(100, 64, 10000.0, scaling, rope_len=length) for length in LENGTHS]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])


def test_angles_are_exact_at_the_far_end() -> None:
    """A float32 angle is wrong by up to 4e-3 at position 131,071."""
    table = build_cos_sin(131072, 64, 500000.0, NONE)
    for pair in (0, 1, 7, 31):
        angle = 131071 * 500000.0 ** -(2 * pair / 64)
        assert abs(float(table[-1, pair]) - math.cos(angle)) < 1e-6
        assert abs(float(table[-1, 32 + pair]) - math.sin(angle)) < 1e-6
