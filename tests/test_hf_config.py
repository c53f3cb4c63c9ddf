"""config.json read without its folder: what transformers reads from it, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fa_research.config import MaskConfig, ModelConfig, RopeScaling, RopeType
from fa_research.config.hf_config import FAMILIES, model_fields
from fa_research.errors import ConfigError
from tests.test_checkpoint_config import LLAMA_3, raw

STRETCHED = RopeScaling(RopeType.llama3, factor=32.0, original_max_position=8192)


def fields(architecture: str = "Llama", **changes: Any) -> ModelConfig:
    return ModelConfig(**model_fields(raw(architecture, **changes), "here"))


def test_sizes_go_to_their_fields() -> None:
    assert fields(rope_theta=5e5, tie_word_embeddings=True) == ModelConfig(
        num_layers=3, hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=16, intermediate_size=80, vocab_size=300,
        max_context_len=4100, rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("Llama", {}, {"rope_theta": 10000.0, "head_dim": 16, "tie_word_embeddings": False}),
        ("Llama", {"num_key_value_heads": ...}, {"num_kv_heads": 6}),
        ("Mistral", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
        ("Llama", {"head_dim": 64}, {"head_dim": 64}),
        ("Llama", {"head_dim": None, "rms_norm_eps": ...}, {"head_dim": 16, "rms_norm_eps": 1e-6}),
        ("Llama", {"sliding_window": 64}, {"mask": MaskConfig()}),  # transformers does not read it there either
        ("Qwen2", {}, {"qkv_bias": True, "qk_norm": False, "head_dim": 16, "mask": MaskConfig()}),
        ("Qwen3", {}, {"qkv_bias": False, "qk_norm": True, "head_dim": 128}),
        ("Mistral", {"sliding_window": 64}, {"mask": MaskConfig("sliding_window", 64)}),
        ("Mistral", {}, {"mask": MaskConfig("sliding_window", 4096)}),
        ("Mistral", {"sliding_window": None}, {"mask": MaskConfig()}),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": False}, {"mask": MaskConfig()}),
        (
            "Qwen2",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            {"mask": MaskConfig()},
        ),
        (
            "Qwen3",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
            {"mask": MaskConfig("sliding_window", 64)},
        ),
        ("Qwen3", {"layer_types": ["full_attention"] * 3}, {"mask": MaskConfig()}),
        ("Ministral", {"sliding_window": 64}, {"mask": MaskConfig("sliding_window", 64)}),
        ("Ministral", {"layer_types": ["full_attention"] * 3}, {"mask": MaskConfig()}),
        ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA_3}, {"rope_theta": 5e5, "rope_scaling": STRETCHED}),
        (
            "Llama",
            {"rope_parameters": {**LLAMA_3, "rope_theta": 2e4}},
            {"rope_theta": 2e4, "rope_scaling": STRETCHED},
        ),
        (
            "Llama",
            {"rope_scaling": {"type": "default"}, "rope_theta": 7.0},
            {"rope_theta": 7.0, "rope_scaling": RopeScaling()},
        ),
        (
            "Llama",
            {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 99},
            {"rope_scaling": dataclasses.replace(STRETCHED, original_max_position=99)},
        ),
    ],
)  # fmt: skip
def test_what_transformers_reads(
    architecture: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = fields(architecture, **changes)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        ("Falcon", {}, "architectures=.*Falcon.* supported are LlamaForCausalLM, MistralForCausalLM, Ministra"),
        ("Llama", {"architectures": ...}, "architectures=null is not supported"),
        ("Llama", {"architectures": [["x"]]}, "architectures=.*is not supported"),
        ("Llama", {"hidden_size": ..., "vocab_size": "9"}, 'hidden_size is missing.*vocab_size="9": expected a whole'),
        ("Llama", {"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number above 0"),
        ("Llama", {"num_hidden_layers": True}, "num_hidden_layers=true: expected"),
        ("Llama", {"max_position_embeddings": -1}, "max_position_embeddings=-1: expected a whole number above 0$"),
        ("Mistral", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("Llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings="yes": expected true or false'),
        ("Llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps=Infinity: expected a number"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*is not supported"),
        ("Llama", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=.*is not supported"),
        ("GptOss", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*is not supported"),
        ("GptOss", {"quantization_config": {"quant_method": ["mxfp4"]}}, "quantization_config=.*is not supported"),
        ("Llama", {"mlp_bias": True}, "mlp_bias=true is not supported"),
        ("Mistral", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("Llama", {"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supported"),
        ("Llama", {"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported; supported are silu, swish, gelu_pyt'),
        ("Gemma2", {"hidden_activation": "gelu"}, 'hidden_activation="gelu" is not supported'),
        ("GptOss", {"swiglu_limit": 8.0}, "swiglu_limit=8.0 is not supported; only 7.0 is"),
        ("Qwen3Moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; every layer must have exp"),
        ("Mixtral", {"num_experts": 4, "num_local_experts": 8}, "num_experts=4 is not.*beside num_local_experts=8"),
        ("Gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 is not supported; give a number above"),
        ("Gemma3", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 is not supported; give a number"),
        ("Llama", {"is_causal": False}, "is_causal=false is not supported"),
        ("Qwen3Moe", {"num_experts": 0}, "num_experts=0: expected a whole number above 0"),
        ("Gemma2", {"sliding_window": None}, "sliding_window=null: expected a whole number"),
        ("Phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported; only 1 is"),
        ("Llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        (
            "Llama",
            {"rope_scaling": {"type": "proportional"}},
            'type "proportional" is not supported; supported are default, linear, dynamic, llama3, yarn, longrope',
        ),
        ("Llama", {"rope_scaling": {"type": "su"}}, 'RoPE of type "su" is not supported'),
        ("Llama", {"rope_scaling": {"type": ["yarn"]}}, r'RoPE of type \["yarn"\] is not supported'),
        ("Llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling.factor is missing: expected a number"),
        ("Llama", {"rope_parameters": {"full_attention": {}}}, "full_attention={} is not supported"),
        ("Llama", {"rope_scaling": {**LLAMA_3, "attention_factor": 2}}, "rope_scaling.attention_factor=2 is not"),
        ("Llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.low_freq_factor is missing"),
        ("Llama", {"rope_scaling": "llama3"}, 'rope_scaling="llama3": expected an object'),
        ("Phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, "type linear is not supported for this arch"),
        ("Gemma3", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type=.linear. is not supported"),
        ("Gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate=false is not"),
        ("Gemma3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type=.yarn. is not supported"),
        (
            "Gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
            "RoPE of type linear for sliding_attention is not supported",
        ),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [1, "a"]}},
            r'rope_scaling.short_factor=1.0: expected a list.*rope_scaling.long_factor=\[1, "a"\]: expected a list',
        ),
        ("Llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types=.* other than full_attention for every"),
        ("Mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=.*other than sliding_attention"),
        ("Qwen3", {"layer_types": ["full_attention"]}, "layer_types=.*one of full_attention.*for each of 3 layers"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types=.*without use_sliding_window"),
        ("Qwen3", {"layer_types": [["linear_attention"]] * 3}, "layer_types=.*one of full_attention and sliding_att"),
    ],
)  # fmt: skip
def test_what_is_refused(architecture: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"here, config.json: .*{says}"):
        fields(architecture, **changes)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        fields(mlp_bias=True, hidden_act="gelu", vocab_size=-1, rope_scaling={"type": "ntk"})
    assert all(key in str(caught.value) for key in ("mlp_bias", "hidden_act", "vocab_size", "ntk"))


def test_the_supported_architectures() -> None:
    names = (
        "Llama",
        "Mistral",
        "Ministral",
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Mixtral",
        "Gemma2",
        "Gemma3",
        "GptOss",
        "Phi3",
    )
    assert list(FAMILIES) == [f"{name}ForCausalLM" for name in names]
