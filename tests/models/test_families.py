"""config.json of every architecture, in the spelling of today and of files on the hub, against what transformers makes
of the same file: its config, the modules it builds, the rotation of each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from fa_research.config import Activation, ModelConfig, RopeType
from fa_research.config.hf_config import model_fields
from fa_research.config.hf_families import FAMILIES
from fa_research.models.rope import build_cos_sin

SIZES: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": 300, "max_position_embeddings": 200, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {"short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GEMMA_3 = {"head_dim": 16, "query_pre_attn_scalar": 24}
# Of files as they are on the hub, the keys that matter, with small sizes.
HUB: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-1", "Llama", {"num_key_value_heads": ..., "rms_norm_eps": 1e-5, "max_sequence_length": 2048}),
    ("llama-2", "Llama", {"pretraining_tp": 1, "rope_scaling": None, "rms_norm_eps": 1e-5}),
    ("llama-3.1", "Llama", {
        "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64, "rope_type": "llama3"},
    }),
    ("llama-biased", "Llama", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    ("llama-linear", "Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama-dynamic", "Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 2e4}),
    ("mistral-7b-v0.1", "Mistral", {"sliding_window": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}),
    ("mistral-7b-v0.3", "Mistral", {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 16}),
    ("ministral-8b", "Ministral", {
        "head_dim": 16, "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2, "rms_norm_eps": 1e-5,
        "rope_theta": 100000000.0, "sliding_window": 50,
    }),
    ("yarn-mistral", "Mistral", {"rope_scaling": {
        "factor": 16.0, "original_max_position_embeddings": 50, "type": "yarn", "finetuned": True}}),
    ("qwen2.5", "Qwen2", {
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 6, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 50, "type": "yarn"},
    }),
    ("qwen2-windows", "Qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 5}),
    ("qwen3-8b", "Qwen3", {
        "attention_bias": False, "head_dim": 32, "max_window_layers": 36, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False,
    }),
    ("qwen3-biased", "Qwen3", {"attention_bias": True}),
    ("qwen3-30b-a3b", "Qwen3Moe", {
        "decoder_sparse_step": 1, "head_dim": 16, "mlp_only_layers": [], "moe_intermediate_size": 40, "num_experts": 6,
        "norm_topk_prob": True, "num_experts_per_tok": 3, "sliding_window": None, "use_sliding_window": False,
    }),
    ("qwen3-moe-windows", "Qwen3Moe", {
        "attention_bias": True, "head_dim": 16, "use_sliding_window": True, "sliding_window": 50, "num_experts": 6,
    }),
    ("mixtral-8x7b", "Mixtral", {
        "num_experts_per_tok": 2, "num_local_experts": 6, "rope_theta": 1000000.0, "sliding_window": None,
    }),
    ("mixtral-windows", "Mixtral", {"sliding_window": 4096}),
    ("gemma-2-2b", "Gemma2", {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 16, "query_pre_attn_scalar": 24,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
        "cache_implementation": "hybrid", "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    }),
    ("gemma-2-defaults", "Gemma2", {}),
    ("gemma-2-no-caps", "Gemma2", {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
        "attention_bias": True,
    }),
    ("gemma-3-1b", "Gemma3", GEMMA_3 | {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6,
    }),
    ("gemma-3-linear", "Gemma3", GEMMA_3 | {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 3, "rope_theta": 5e5,
        "rope_local_base_freq": 2000.0,
    }),
    ("gemma-3-today", "Gemma3", GEMMA_3 | {
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        "_sliding_window_pattern": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        },
    }),
    ("gemma-3-defaults", "Gemma3", {}),
    ("gemma-3-all-local", "Gemma3", GEMMA_3 | {"layer_types": ["sliding_attention"] * 8}),
    ("gemma-3-all-full", "Gemma3", GEMMA_3 | {"layer_types": ["full_attention"] * 8}),
    ("gpt-oss-20b", "GptOss", {
        "attention_bias": True, "experts_per_token": 4, "head_dim": 16, "hidden_act": "silu",
        "initial_context_length": 50, "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_experts_per_tok": 3, "num_local_experts": 6, "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0, "rope_type": "yarn", "truncate": False,
                         "original_max_position_embeddings": 50},
        "sliding_window": 128, "swiglu_limit": 7.0, "quantization_config": MXFP4,
    }),
    ("gpt-oss-no-scaling", "GptOss", {"num_local_experts": 6, "rope_parameters": {}}),
    ("gemma-3-yarn", "Gemma3", GEMMA_3 | {
        "original_max_position_embeddings": 10,  # not read there
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50},
    }),
    ("llama-yarn-null", "Llama", {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50, "truncate": None,
    }}),
    ("gpt-oss-defaults", "GptOss", {"num_local_experts": 6}),
    ("phi-3-mini-4k", "Phi3", {
        "attention_bias": False, "original_max_position_embeddings": 200, "rope_scaling": None, "sliding_window": 2047,
    }),
    ("phi-3-mini-128k", "Phi3", {
        "num_key_value_heads": ..., "original_max_position_embeddings": 50, "sliding_window": 262144,
        "rope_scaling": {**LONGROPE, "type": "longrope"},
    }),
    ("phi-3-defaults", "Phi3", {
        "max_position_embeddings": 8192,
        "rope_scaling": {**LONGROPE, "type": "longrope", "original_max_position_embeddings": 70},
    }),
    ("phi-4-like", "Phi3", {
        "original_max_position_embeddings": 50, "partial_rotary_factor": 1.0, "rope_theta": 2e4,
        "rope_scaling": {**LONGROPE, "rope_type": "longrope", "original_max_position_embeddings": 70},
    }),
]  # fmt: skip
CASES = [pytest.param(architecture, changes, id=name) for name, architecture, changes in HUB]


def of_file(architecture: str, changes: dict[str, Any], folder: Path) -> tuple[ModelConfig, Any]:
    """Our config and that of transformers, read from one file."""
    keys = {"architectures": [f"{architecture}ForCausalLM"], **SIZES, **changes}
    raw = {key: value for key, value in keys.items() if value is not ...}
    raw["model_type"] = getattr(transformers, config_class(architecture)).model_type
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig(**model_fields(raw, "here")), transformers.AutoConfig.from_pretrained(folder)


def config_class(architecture: str) -> str:
    return "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"


def is_local(ours: ModelConfig) -> list[bool]:
    pattern = ours.local.pattern or [False]
    return [pattern[i % len(pattern)] for i in range(ours.num_layers)]


def module_of(architecture: str, theirs: Any) -> Any:
    with torch.device("meta"):
        return getattr(transformers, f"{architecture}ForCausalLM")(theirs)


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_numbers_are_those_that_transformers_reads(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = of_file(architecture, changes, tmp_path)
    assert ours.architecture == f"{architecture}ForCausalLM"
    assert {
        "num_hidden_layers": ours.num_layers,
        "hidden_size": ours.hidden_size,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "vocab_size": ours.vocab_size,
        "rms_norm_eps": ours.rms_norm_eps,
        "tie_word_embeddings": ours.tie_word_embeddings,
    }.items() <= theirs.to_dict().items()
    assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.logit_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0)
    moe = ours.moe
    assert moe.num_experts == getattr(theirs, "num_local_experts", getattr(theirs, "num_experts", 0))
    if moe.num_experts:
        assert moe.experts_per_token == theirs.num_experts_per_tok
        assert moe.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_windows_are_those_of_each_layer(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = of_file(architecture, changes, tmp_path)
    masks = [ours.local.mask if local else ours.mask for local in is_local(ours)]
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    assert [mask.size for mask in masks] == [
        window if kind == "sliding_attention" else None for kind in kinds
    ]
    assert all(mask.name == ("sliding_window" if mask.size else "causal") for mask in masks)


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_modules_are_those_that_transformers_builds(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = of_file(architecture, changes, tmp_path)
    model = module_of(architecture, theirs).model
    layer = model.layers[0]
    attention = layer.self_attn
    q = getattr(attention, "q_proj", None) or attention.qkv_proj
    assert ours.qkv_bias == (q.bias is not None)
    assert ours.o_bias == (attention.o_proj.bias is not None)
    assert attention.o_proj.in_features == ours.num_heads * ours.head_dim
    assert ours.qk_norm == hasattr(attention, "q_norm")
    assert ours.sink == hasattr(attention, "sinks")
    assert ours.post_norms == hasattr(layer, "post_feedforward_layernorm")
    assert attention.scaling == pytest.approx(ours.attention_scale or ours.head_dim**-0.5)
    if architecture == "Gemma3":  # the attribute is there, its attention does not use it
        assert ours.softcap == 0.0
    else:
        assert ours.softcap == (getattr(attention, "attn_logit_softcapping", None) or 0.0)
    assert getattr(model.embed_tokens, "scalar_embed_scale", 1.0) == ours.embedding_scale
    experts = getattr(layer.mlp, "experts", None)
    assert (experts is not None) == (ours.moe.num_experts > 0)
    assert hasattr(experts, "down_proj_bias") == ours.moe.bias
    act = getattr(experts or layer.mlp, "act_fn", getattr(layer.mlp, "activation_fn", None))
    names = {Activation.silu: "silu", Activation.gelu_tanh: "gelu_pytorch_tanh"}
    if ours.activation is Activation.swiglu_clamped:
        assert (experts.alpha, experts.limit) == (1.702, 7.0)
    else:
        assert type(act) is type(ACT2FN[names[ours.activation]])


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_rotations_are_those_of_each_layer(
    architecture: str, changes: dict[str, Any], length: int, tmp_path: Path
) -> None:
    """Shorter than the original length of those files that have one, and longer."""
    ours, theirs = of_file(architecture, changes, tmp_path)
    module = __import__(type(theirs).__module__.replace("configuration", "modeling"), fromlist=["_"])
    rotary = getattr(module, f"{architecture}RotaryEmbedding")(theirs)
    positions = torch.arange(length)[None]
    kinds = getattr(theirs, "layer_types", None) or [None] * ours.num_layers
    half = ours.head_dim // 2
    for kind, local in zip(kinds, is_local(ours), strict=True):
        options = {"layer_type": kind} if architecture == "Gemma3" else {}
        cos, sin = rotary(torch.zeros(1), positions, **options)
        theta, scaling = ours.rope_theta, ours.rope_scaling
        if local and ours.local.rope_theta is not None:
            theta, scaling = ours.local.rope_theta, type(scaling)()
        table = build_cos_sin(length, ours.head_dim, theta, scaling)
        torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=3e-5)
        torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=3e-5)


@pytest.mark.parametrize("architecture", [name.removesuffix("ForCausalLM") for name in FAMILIES])
def test_what_transformers_saves_is_read(architecture: str, tmp_path: Path) -> None:
    """A config in today's spelling says the same as the keys it was made from."""
    changes = {"num_local_experts": 6} if architecture in ("Mixtral", "GptOss") else {}
    ours, theirs = of_file(architecture, changes, tmp_path)
    theirs.architectures = [f"{architecture}ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert ModelConfig(**model_fields(saved, "here")) == ours


def test_layers_that_differ_are_the_shortest_cycle(tmp_path: Path) -> None:
    def pattern(architecture: str, **changes: Any) -> list[bool]:
        return of_file(architecture, changes, tmp_path)[0].local.pattern

    assert pattern("GptOss") == [True, False]
    assert pattern("Gemma3") == [True] * 5 + [False]
    late = {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 5}
    assert pattern("Qwen2", **late) == [False] * 5 + [True] * 3
    assert pattern("Gemma2", layer_types=["full_attention", "sliding_attention", "sliding_attention"] * 2 + [
        "full_attention", "sliding_attention"
    ]) == [False, True, True]  # fmt: skip
    assert pattern("Gemma3", num_hidden_layers=5) == []


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, 600),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 50}}, 400),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}}, 200),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 200),
        ({}, 200),
    ],
)
def test_context_that_a_scaling_stretches(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    assert of_file("Llama", changes, tmp_path)[0].max_context_len == length


def test_factors_that_are_ratios_of_lengths(tmp_path: Path) -> None:
    table = {**LONGROPE, "type": "su"}
    phi = of_phi(rope_scaling=table, original_max_position_embeddings=50)
    assert (phi.rope_scaling.type, phi.rope_scaling.factor) == (RopeType.longrope, 4.0)
    assert of_phi(rope_scaling={**table, "factor": 3}).rope_scaling.factor == 3
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 50}
    assert of_file("Llama", {"rope_scaling": yarn}, tmp_path)[0].rope_scaling.factor == 4.0


def of_phi(**changes: Any) -> ModelConfig:
    """Without transformers, whose check of the type `su` asks for a key that its config then provides."""
    raw = {"architectures": ["Phi3ForCausalLM"], **SIZES, **changes}
    return ModelConfig(**model_fields(raw, "here"))
