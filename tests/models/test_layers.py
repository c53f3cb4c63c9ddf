"""What `ModelConfig` says of layers beyond Llama's, and what is counted of a model. Results are for test_parity.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fa_research.config import LocalConfig, MaskConfig, MoEConfig, RopeScaling
from fa_research.masks import Causal, SlidingWindow
from fa_research.models import Decoder, attention_specs, build_model
from fa_research.models.rope import build_cos_sin
from tests.models.test_decoder import SMALL, DenseAttention


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(tied: bool) -> None:
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    model = Decoder(config, dtype=torch.float16, device="cpu")
    layer, norms = (6 + 2 + 2) * 32 * 96 + 96 * 6 * 32 + 3 * 96 * 80, 4 * (3 * 2 + 1) * 96
    assert model.weight_bytes == 2 * (3 * layer + (1 if tied else 2) * 120 * 96) + norms
    assert model.step_weight_bytes(7, 3) == 2 * (3 * layer + 120 * 96) + norms


def test_work_of_a_mixture_of_experts() -> None:
    """One token reads exactly its experts, many read nearly all; multiply-adds are those of the chosen ones."""
    config = dataclasses.replace(SMALL, moe=MoEConfig(num_experts=16, experts_per_token=4, bias=True))
    model = Decoder(config, dtype=torch.float16, device="cpu")
    expert = 3 * 96 * 80 + 2 * 80 + 96
    others = model.weight_bytes - 120 * 96 * 2 - 2 * 3 * 16 * expert
    assert model.step_weight_bytes(1, 1) == others + 2 * 3 * 4 * expert
    # Two tokens share one of their four experts on average.
    assert model.step_weight_bytes(2, 1) == others + 2 * (2 * 7 + 4) * expert
    assert 0.98 < model.step_weight_bytes(16, 16) / (model.weight_bytes - 120 * 96 * 2) < 1
    attention, mlp = (6 + 2 + 2) * 32 * 96 + 96 * 6 * 32, 16 * 96 + 4 * 3 * 96 * 80
    assert model.multiply_adds(5, 5) == 5 * (3 * (attention + mlp) + 120 * 96)
    last = 96 * 6 * 32 + mlp
    assert model.multiply_adds(5, 2) == model.multiply_adds(5, 5) - 3 * (last + 120 * 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_weights_are_float32_and_all_else_is_of_the_dtype(dtype: torch.dtype) -> None:
    config = dataclasses.replace(
        SMALL, qk_norm=True, qkv_bias=True, o_bias=True, sink=True, post_norms=True, moe=MoEConfig(4, 2)
    )
    model = Decoder(config, dtype=dtype, device="cpu")
    norms = {name for name, weight in model.named_parameters() if "_norm_" in name}
    assert len(norms) == 3 * 6 + 1
    assert all(w.dtype == (torch.float32 if n in norms else dtype) for n, w in model.named_parameters())


def test_local_layers_have_their_own_mask_and_rotation() -> None:
    local = LocalConfig([True, False], MaskConfig("sliding_window", 7), rope_theta=77.0)
    config = dataclasses.replace(SMALL, num_layers=5, local=local, attention_scale=0.2)
    model = build_model(config, dtype=torch.float32, device="cpu", seed=0)
    assert [spec.mask for spec in model.attention_specs] == [SlidingWindow(7), Causal()] * 2 + [
        SlidingWindow(7)
    ]
    assert {spec.scale for spec in model.attention_specs} == {0.2}
    attend = DenseAttention(9)
    model(torch.arange(9), attend)
    assert [rope is model.local_cos_sin_XD for _, rope, _ in attend.calls] == [True, False, True, False, True]
    assert all(rope is model.cos_sin_XD for layer_id, rope, _ in attend.calls if layer_id % 2)
    expected = build_cos_sin(config.max_context_len, 32, 77.0, RopeScaling())
    assert torch.equal(model.local_cos_sin_XD, expected) and not torch.equal(model.cos_sin_XD, expected)
    shared = Decoder(
        dataclasses.replace(config, local=dataclasses.replace(local, rope_theta=None)),
        dtype=torch.float32,
        device="cpu",
    )
    assert shared.local_cos_sin_XD is None


def test_scaled_embedding_and_capped_logits() -> None:
    """The scale is rounded to the model's dtype, as transformers rounds Gemma's: sqrt(3072) is 55.5 in bfloat16."""
    config = dataclasses.replace(SMALL, embedding_scale=3072**0.5, logit_softcap=0.05, num_layers=1)
    assert Decoder(config, dtype=torch.bfloat16, device="cpu").embedding_scale == 55.5
    model = build_model(config, dtype=torch.float64, device="cpu", seed=0)
    plain = build_model(dataclasses.replace(config, embedding_scale=1.0, logit_softcap=0.0),
                        dtype=torch.float64, device="cpu", seed=0)  # fmt: skip
    before = plain.embedding.clone()
    ids = torch.arange(9)
    hidden = model(ids, DenseAttention(9))
    assert torch.equal(model.embedding, before)  # scaled where they are looked up, not in the table
    plain.embedding *= 3072**0.5
    torch.testing.assert_close(hidden, plain(ids, DenseAttention(9)), rtol=1e-12, atol=1e-12)
    logits = plain.compute_logits(hidden)
    torch.testing.assert_close(
        model.compute_logits(hidden), 0.05 * torch.tanh(logits / 0.05), rtol=1e-12, atol=0
    )


def test_attention_specs_follow_the_config_and_allocate_nothing() -> None:
    config = dataclasses.replace(  # 70B and more: would not fit here if anything were allocated
        SMALL, num_layers=80, hidden_size=2**20, num_heads=64, num_kv_heads=8, head_dim=128, softcap=30.0,
        mask=MaskConfig("sliding_window", 256),
    )  # fmt: skip
    specs = attention_specs(config)
    assert len(specs) == 80
    spec = specs[79]
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == (64, 8, 128, 128)
    assert (spec.scale, spec.softcap, spec.mask, spec.has_sink) == (
        128**-0.5,
        30.0,
        SlidingWindow(256),
        False,
    )
