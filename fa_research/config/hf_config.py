"""From the config.json of a Hugging Face folder to `ModelConfig`. No torch, no transformers.

A field that changes what the model computes is taken over or refused. Fields that transformers itself does not read for
these architectures (token ids, dropout, training settings) are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fa_research.config.schemas import MaskConfig, RopeScaling, RopeType
from fa_research.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name alone says.

    windows: `no` sliding windows; `all` layers, by `sliding_window`; or `by layer`, as `layer_types` says, or
    `use_sliding_window` with `max_window_layers`.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json has none; None: hidden size / heads
    windows: str = "no"


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(windows="all"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="by layer"),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, windows="by layer"),
}

# Key of config.json -> key of ModelConfig, whole numbers without which there is no model.
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_context_len",
}
# Present and neither null, false, 0 nor empty: the model computes something that is not here.
_UNSUPPORTED = (
    "quantization_config", "compression_config", "attention_bias", "mlp_bias", "num_experts", "num_local_experts",
    "n_routed_experts", "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size",
    "no_rope_layers", "is_encoder_decoder", "add_cross_attention", "text_config",
)  # fmt: skip
_ROPE_TYPES = ("default", "llama3")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")


def model_fields(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config.json decides. Raises ConfigError with everything that is missing or not
    supported, beginning with `where`."""
    family = FAMILIES[_architecture(raw, where)]
    reader = _Reader(raw)
    fields: dict[str, Any] = {ours: reader.whole(theirs) for theirs, ours in _SIZES.items()}
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    default_dim = family.head_dim or (hidden // heads if heads else 0)
    fields["head_dim"] = reader.whole("head_dim", default_dim)
    # Absent, the default differs between architectures; Llama 1 and 2 wrote no key where it equals the query heads.
    absent_is_heads = family == FAMILIES["LlamaForCausalLM"] or "num_key_value_heads" in raw
    fields["num_kv_heads"] = reader.whole("num_key_value_heads", heads if absent_is_heads else None)
    fields["rms_norm_eps"] = reader.number("rms_norm_eps", 1e-6)
    fields["tie_word_embeddings"] = reader.flag("tie_word_embeddings")
    fields |= {"qk_norm": family.qk_norm, "qkv_bias": family.qkv_bias}
    fields |= _rope(reader)
    fields["mask"] = _mask(reader, family, fields["num_layers"])
    _refuse_unsupported(reader)
    if reader.problems:
        raise ConfigError(f"{where}, config.json: {'; '.join(reader.problems)}")
    return fields


class _Reader:
    """Reads keys and keeps what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = []

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return self._wrong(key, "a whole number above 0", 0)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self._wrong(key, "a number", 0.0)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        return (
            value
            if isinstance(value, bool)
            else value is not None and self._wrong(key, "true or false", False)
        )

    def refuse(self, key: str, because: str) -> None:
        self.problems.append(f"{self.prefix}{key}={json.dumps(self.raw.get(key))} is not supported{because}")

    def _wrong(self, key: str, expected: str, stand_in: Any) -> Any:
        given = f"={json.dumps(self.raw[key])}" if key in self.raw else " is missing"
        self.problems.append(f"{self.prefix}{key}{given}: expected {expected}")
        return stand_in


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    named = raw.get("architectures")
    if isinstance(named, list) and named in [[name] for name in FAMILIES]:
        return str(named[0])
    raise ConfigError(
        f"{where}, config.json: architectures={json.dumps(named)} is not supported; "
        f"supported are {', '.join(FAMILIES)}"
    )


def _rope(reader: _Reader) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from today's `rope_parameters` or yesterday's two keys."""
    table = reader.raw.get("rope_scaling") or reader.raw.get("rope_parameters") or {}
    if not isinstance(table, dict):
        reader.problems.append(f"rope_scaling={json.dumps(table)}: expected an object")
        return {}
    rope = _Reader({"rope_theta": reader.raw.get("rope_theta"), **table}, "rope_scaling.")
    rope.problems = reader.problems
    theta = rope.number("rope_theta", 10000.0)
    partial = table.get("partial_rotary_factor", reader.raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        reader.problems.append(f"partial_rotary_factor={json.dumps(partial)} is not supported; only 1 is")
    name = table.get("rope_type", table.get("type", "default"))
    if name not in _ROPE_TYPES:
        rope.problems.append(
            f"RoPE of type {json.dumps(name)} is not supported; supported are {', '.join(_ROPE_TYPES)}"
        )
        return {}
    known = _ROPE_KEYS | (
        {*_LLAMA3_NUMBERS, "original_max_position_embeddings"} if name == "llama3" else set()
    )
    for key in sorted(table.keys() - known):
        rope.refuse(key, f" with RoPE of type {name}")
    if name == "default":
        return {"rope_theta": theta, "rope_scaling": RopeScaling()}
    return {"rope_theta": theta, "rope_scaling": _llama3(rope, reader)}


def _llama3(rope: _Reader, reader: _Reader) -> RopeScaling:
    numbers: dict[str, Any] = {key: rope.number(key) for key in _LLAMA3_NUMBERS}
    key = "original_max_position_embeddings"  # beside the table it comes first, as in transformers
    length = reader if reader.raw.get(key) else rope
    original = length.whole(key, reader.raw.get("max_position_embeddings"))
    return RopeScaling(RopeType.llama3, original_max_position=original, **numbers)


def _mask(reader: _Reader, family: Family, num_layers: int) -> MaskConfig:
    """The mask that all layers share."""
    kinds = _kinds_of_layers(reader, family, num_layers)
    if kinds == {"full_attention"}:
        return MaskConfig()
    if kinds == {"sliding_attention"}:
        absent = 4096 if "sliding_window" not in reader.raw else None
        return MaskConfig("sliding_window", reader.whole("sliding_window", absent))
    reader.problems.append(
        f"layers of the kinds {', '.join(sorted(kinds))} are not supported; all must be full_attention, "
        "or all sliding_attention"
    )
    return MaskConfig()


def _kinds_of_layers(reader: _Reader, family: Family, num_layers: int) -> set[str]:
    raw = reader.raw
    listed = raw.get("layer_types")
    if family.windows == "by layer":
        if listed is not None:
            kinds = set(map(str, listed)) if isinstance(listed, list) else {str(listed)}
            if "sliding_attention" in kinds and not reader.flag("use_sliding_window"):
                reader.refuse("layer_types", " without use_sliding_window")
            return kinds
        first = reader.whole("max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
        windowed = reader.flag("use_sliding_window") and raw.get("sliding_window", 4096) is not None
        return {
            "sliding_attention" if windowed and i >= first else "full_attention" for i in range(num_layers)
        } or {"full_attention"}
    windowed = family.windows == "all" and raw.get("sliding_window", 4096) is not None
    kind = "sliding_attention" if windowed else "full_attention"
    if listed is not None and listed != [kind] * num_layers:
        reader.refuse("layer_types", f" by {raw['architectures'][0]} other than {kind} for every layer")
    return {kind}


def _refuse_unsupported(reader: _Reader) -> None:
    for key in _UNSUPPORTED:
        if reader.raw.get(key):
            reader.refuse(key, "")
    if reader.raw.get("hidden_act", "silu") not in ("silu", "swish"):
        reader.refuse("hidden_act", "; only silu is")
