"""From the config.json of a Hugging Face folder to `ModelConfig`. No torch, no transformers.

A field that changes what the model computes is taken over or refused. Fields that transformers itself does not read for
these architectures (token ids, dropout, training settings) are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fa_research.config.hf_families import FAMILIES, RESULT_KEYS, Family
from fa_research.config.hf_layers import read_masks
from fa_research.config.hf_reader import Reader
from fa_research.config.hf_rope import context_len, read_rope
from fa_research.config.model_schema import Activation, MoEConfig, RopeScaling
from fa_research.errors import ConfigError

# Key of config.json -> key of ModelConfig, whole numbers without which there is no model.
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_context_len",
}
_ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
}
# What the names of activations do not say, and is the same in every checkpoint.
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def model_fields(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config.json decides. Raises ConfigError with everything that is missing or not
    supported, beginning with `where`."""
    architecture = _architecture(raw, where)
    family = FAMILIES[architecture]
    reader = Reader(raw)
    fields: dict[str, Any] = {"architecture": architecture, **_sizes(reader, family)}
    fields["rms_norm_eps"] = reader.number("rms_norm_eps", family.rms_norm_eps)
    fields["tie_word_embeddings"] = reader.flag("tie_word_embeddings", family.tie_word_embeddings)
    bias = "attention_bias" in family.reads and reader.flag("attention_bias", family.attention_bias)
    fields |= {"qkv_bias": family.qkv_bias or bias, "o_bias": bias}
    fields |= {"qk_norm": family.qk_norm, "sink": family.sink, "activation": _activation(reader, family)}
    rope = read_rope(reader, family)
    fields["mask"], fields["local"] = read_masks(reader, family, fields["num_layers"], rope.local_theta)
    fields |= {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
    every_layer_local = fields["mask"].name == "sliding_window"
    if every_layer_local and rope.local_theta is not None:
        fields |= {"rope_theta": rope.local_theta, "rope_scaling": RopeScaling()}
    fields["max_context_len"] = context_len(fields["max_context_len"], fields["rope_scaling"])
    if family.gemma:
        fields |= _gemma(reader, family, fields["hidden_size"])
    if family.moe is not None:
        fields["moe"] = _moe(reader, family, family.moe)
    _refuse_unsupported(reader, family)
    if reader.problems:
        raise ConfigError(f"{where}, config.json: {'; '.join(dict.fromkeys(reader.problems))}")
    return fields


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    named = raw.get("architectures")
    if isinstance(named, list) and named in [[name] for name in FAMILIES]:
        return str(named[0])
    raise ConfigError(
        f"{where}, config.json: architectures={json.dumps(named)} is not supported; "
        f"supported are {', '.join(FAMILIES)}"
    )


def _sizes(reader: Reader, family: Family) -> dict[str, int]:
    sizes = {ours: reader.whole(theirs) for theirs, ours in _SIZES.items()}
    heads = sizes["num_heads"]
    sizes["intermediate_size"] = reader.whole(family.intermediate_size, family.moe_intermediate_size)
    sizes["head_dim"] = reader.whole("head_dim", family.head_dim or max(1, sizes["hidden_size"] // heads))
    # Absent, the default differs between architectures; Llama 1 and 2 wrote no key where it equals the query heads.
    absent_is_heads = family.kv_heads_are_heads or "num_key_value_heads" in reader.raw
    sizes["num_kv_heads"] = reader.whole("num_key_value_heads", heads if absent_is_heads else None)
    return sizes


def _activation(reader: Reader, family: Family) -> Activation:
    if family.activation is Activation.swiglu_clamped:  # whatever the key says
        for key, value in _SWIGLU.items():
            if reader.number(key, value) != value:
                reader.refuse(key, f"; only {value} is")
        return family.activation
    name = reader.raw.get(family.activation_key)
    if name is None:
        return family.activation
    if name not in list(_ACTIVATIONS):
        reader.refuse(family.activation_key, f"; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS.get(str(name), family.activation)


def _gemma(reader: Reader, family: Family, hidden_size: int) -> dict[str, Any]:
    return {
        "post_norms": True,
        "embedding_scale": hidden_size**0.5,
        "attention_scale": reader.whole("query_pre_attn_scalar", 256) ** -0.5,
        "softcap": _cap(reader, "attn_logit_softcapping", family.softcap) if family.softcap else 0.0,
        "logit_softcap": _cap(reader, "final_logit_softcapping", family.logit_softcap),
    }


def _cap(reader: Reader, key: str, default: float | None) -> float:
    """0 for none, which config.json writes as null: transformers divides by a 0."""
    cap = reader.optional(key, default)
    if cap is not None and cap <= 0:
        reader.refuse(key, "; give a number above 0, or null for none")
    return cap or 0.0


def _moe(reader: Reader, family: Family, default: MoEConfig) -> MoEConfig:
    names = [name for name in ("num_experts", "num_local_experts") if reader.raw.get(name) is not None]
    if len(names) == 2 and reader.raw[names[0]] != reader.raw[names[1]]:
        reader.refuse(
            "num_experts", f" beside num_local_experts={json.dumps(reader.raw[names[1]])}; give one"
        )
    if reader.raw.get("decoder_sparse_step", 1) != 1:
        reader.refuse("decoder_sparse_step", "; every layer must have experts")
    norm = default.norm_topk_prob
    return MoEConfig(
        num_experts=reader.whole(names[0] if names else "num_experts", default.num_experts),
        experts_per_token=reader.whole("num_experts_per_tok", default.experts_per_token),
        norm_topk_prob=reader.flag("norm_topk_prob", norm) if "norm_topk_prob" in family.reads else norm,
        bias=default.bias,
    )


def _refuse_unsupported(reader: Reader, family: Family) -> None:
    quantized = reader.raw.get("quantization_config")
    loadable = isinstance(quantized, dict) and quantized.get("quant_method") in family.quant_methods
    for key in RESULT_KEYS:
        if (
            reader.raw.get(key)
            and key not in family.reads
            and not (key == "quantization_config" and loadable)
        ):
            reader.refuse(key)
    if not reader.raw.get("is_causal", True):
        reader.refuse("is_causal")
