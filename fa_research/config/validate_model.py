"""Checks across the keys of `model`. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from fa_research import masks
from fa_research.config.hf_families import FAMILIES
from fa_research.config.limits import at_least, positive, zero_or_positive
from fa_research.config.model_schema import (
    LocalConfig,
    MaskConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RopeType,
)

_SIZES = "num_layers hidden_size num_heads num_kv_heads head_dim intermediate_size vocab_size max_context_len"


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Each names its key, what was given and what would work."""
    if model.architecture not in FAMILIES:
        yield f"model.architecture={model.architecture}: choose one of {', '.join(FAMILIES)}"
    if model.changed is not None and model.path is None:
        yield f"model.changed={model.changed}: is filled in where model.path is read; leave it out"
    for name in _SIZES.split():
        yield from at_least(f"model.{name}", getattr(model, name), 1)
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads={model.num_heads} with model.num_kv_heads={model.num_kv_heads}: "
            "the query heads must be a multiple of the KV heads"
        )
    if model.head_dim % 2:
        yield f"model.head_dim={model.head_dim}: must be even, rotary embedding turns pairs"
    for name in ("rope_theta", "rms_norm_eps", "embedding_scale", "attention_scale"):
        yield from positive(f"model.{name}", getattr(model, name))
    for name in ("softcap", "logit_softcap"):
        yield from zero_or_positive(f"model.{name}", getattr(model, name))
    yield from _mask("model.mask", model.mask)
    yield from _local(model.local)
    yield from _moe(model.moe)
    yield from _rope_scaling(model)


def _mask(key: str, mask: MaskConfig) -> Iterator[str]:
    try:
        masks.build(mask.name, mask.size, mask.options)
    except ValueError as error:
        yield f"{key}: {error}"


def _local(local: LocalConfig) -> Iterator[str]:
    yield from _mask("model.local.mask", local.mask)
    yield from positive("model.local.rope_theta", local.rope_theta)
    if not any(local.pattern) and local != LocalConfig():
        yield (
            f"model.local.pattern={local.pattern}: no layer is local, so the rest of model.local has no effect; "
            "give a pattern, as [true,false] for every other layer"
        )


def _moe(moe: MoEConfig) -> Iterator[str]:
    yield from at_least("model.moe.num_experts", moe.num_experts, 0)
    if moe.num_experts > 0 and not 1 <= moe.experts_per_token <= moe.num_experts:
        yield (
            f"model.moe.experts_per_token={moe.experts_per_token}: "
            f"must be from 1 to model.moe.num_experts={moe.num_experts}"
        )


def _rope_scaling(model: ModelConfig) -> Iterator[str]:
    rope, key = model.rope_scaling, "model.rope_scaling"
    if rope.type is RopeType.none:
        return
    yield from positive(f"{key}.factor", rope.factor)
    yield from at_least(f"{key}.original_max_position", rope.original_max_position, 1)
    match rope.type:
        case RopeType.dynamic if model.head_dim == 2:
            yield f"model.head_dim=2 with {key}.type=dynamic: must be at least 4"
        case RopeType.llama3:
            yield from _ordered(rope, "low_freq_factor", "high_freq_factor")
        case RopeType.yarn:
            yield from _yarn(model)
        case RopeType.longrope:
            yield from _longrope(model)


def _yarn(model: ModelConfig) -> Iterator[str]:
    rope, key = model.rope_scaling, "model.rope_scaling"
    yield from _ordered(rope, "beta_slow", "beta_fast")
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        yield from positive(f"{key}.{name}", getattr(rope, name))
    if model.rope_theta <= 1:
        yield f"model.rope_theta={model.rope_theta} with {key}.type=yarn: must be above 1"


def _longrope(model: ModelConfig) -> Iterator[str]:
    rope, key = model.rope_scaling, "model.rope_scaling"
    yield from positive(f"{key}.attention_factor", rope.attention_factor)
    if rope.original_max_position == 1:
        yield f"{key}.original_max_position=1: must be at least 2 with longrope"
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if len(factors) != model.head_dim // 2:
            yield (
                f"{key}.{name} has {len(factors)} numbers: must have model.head_dim / 2 = {model.head_dim // 2}, "
                "one for each pair of dimensions"
            )
        for i, factor in enumerate(factors):
            yield from positive(f"{key}.{name}[{i}]", factor)


def _ordered(rope: RopeScaling, low: str, high: str) -> Iterator[str]:
    """Two positive numbers, the first below the second."""
    key = "model.rope_scaling"
    for name in (low, high):
        yield from positive(f"{key}.{name}", getattr(rope, name))
    if not getattr(rope, low) < getattr(rope, high):
        yield f"{key}.{low}={getattr(rope, low)}: must be below {key}.{high}={getattr(rope, high)}"
