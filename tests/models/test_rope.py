"""The rope table against transformers, and against exact angles far out."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fa_research.config import RopeScaling, RopeType
from fa_research.models.rope import build_cos_sin, inverse_frequencies

NONE = RopeScaling()
LLAMA_3_1 = RopeScaling(RopeType.llama3)
LLAMA_3_2 = RopeScaling(RopeType.llama3, factor=32.0)
UNUSUAL = RopeScaling(
    RopeType.llama3, 4.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_position=1024
)


def peer(head_dim: int, theta: float, scaling: RopeScaling) -> LlamaConfig:
    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling.type is RopeType.llama3:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 48])
@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2, UNUSUAL], ids=["3.1", "3.2", "unusual"])
def test_llama3_scaling_is_that_of_transformers(head_dim: int, scaling: RopeScaling) -> None:
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](peer(head_dim, 500000.0, scaling), "cpu")
    assert attention_factor == 1.0
    actual = inverse_frequencies(head_dim, 500000.0, scaling)
    torch.testing.assert_close(actual, expected.double(), rtol=3e-6, atol=0)
    unscaled = inverse_frequencies(head_dim, 500000.0, NONE)
    assert actual[0] == unscaled[0]
    assert math.isclose(actual[-1], unscaled[-1] / scaling.factor)


@pytest.mark.parametrize("scaling", [NONE, LLAMA_3_1], ids=["none", "llama3"])
def test_table_is_that_of_transformers(scaling: RopeScaling) -> None:
    positions = torch.arange(100)
    cos, sin = LlamaRotaryEmbedding(peer(64, 10000.0, scaling))(torch.zeros(1), positions[None])
    table = build_cos_sin(100, 64, 10000.0, scaling)
    assert table.shape == (100, 64)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], rtol=0, atol=1e-5)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], rtol=0, atol=1e-5)


def test_angles_are_exact_at_the_far_end() -> None:
    """A float32 angle is wrong by up to 4e-3 at position 131,071."""
    table = build_cos_sin(131072, 64, 500000.0, NONE)
    for pair in (0, 1, 7, 31):
        angle = 131071 * 500000.0 ** -(2 * pair / 64)
        assert abs(float(table[-1, pair]) - math.cos(angle)) < 1e-6
        assert abs(float(table[-1, 32 + pair]) - math.sin(angle)) < 1e-6
