"""Which tensors of a checkpoint are which weights of the decoder, as each architecture names them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fa_research.models.decoder import Decoder
from fa_research.models.experts import Target, expert_targets
from fa_research.models.layers import DecoderLayer
from fa_research.models.moe import MoE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Names:
    """What sets an architecture's checkpoints apart from Llama's.

    fused: Q, K and V are one tensor, gate and up are one.
    norms_are_offsets: norm weights are stored as what is added to 1.
    """

    fused: bool = False
    norms_are_offsets: bool = False


LLAMA = Names()
NAMES = {
    "Phi3ForCausalLM": Names(fused=True),
    "Gemma2ForCausalLM": Names(norms_are_offsets=True),
    "Gemma3ForCausalLM": Names(norms_are_offsets=True),
}


def weight_targets(model: Decoder, stored: Collection[str] = ()) -> dict[str, Target]:
    """Name in a checkpoint (the first one's, of targets made from several) -> where it goes. `stored` are the names
    that the checkpoint has, where there is a choice."""
    names = NAMES.get(model.config.architecture, LLAMA)
    targets: dict[str, Tensor] = {EMBEDDING: model.embedding}
    if model.head is not model.embedding:
        targets[HEAD] = model.head
    found = _plain(targets) | _norms({"model.norm": model.final_norm_E}, names)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"model.layers.{i}."
        found |= _plain({prefix + name: weight for name, weight in _matrices(layer, names).items()})
        found |= _norms({prefix + name: weight for name, weight in _layer_norms(layer).items()}, names)
        if isinstance(layer.mlp, MoE):
            found |= expert_targets(model.config.architecture, layer.mlp, prefix, stored)
    return found


def _matrices(layer: DecoderLayer, names: Names) -> dict[str, Tensor]:
    """Everything but norms and experts."""
    rows = [heads * layer.head_dim for heads in layer.heads]
    letters, sizes = ("qkv", [sum(rows)]) if names.fused else ("q k v", rows)
    projections = [f"self_attn.{letter}_proj" for letter in letters.split()]
    found: dict[str, Tensor] = {}
    for kind, weight in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if weight is not None:
            parts = weight.split(sizes)
            found |= {f"{name}.{kind}": part for name, part in zip(projections, parts, strict=True)}
    found["self_attn.o_proj.weight"] = layer.o
    if layer.o_bias is not None:
        found["self_attn.o_proj.bias"] = layer.o_bias
    if layer.sinks_H is not None:
        found["self_attn.sinks"] = layer.sinks_H
    return found if isinstance(layer.mlp, MoE) else found | _mlp(layer, names)


def _mlp(layer: DecoderLayer, names: Names) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"mlp.down_proj.weight": layer.mlp.down}
    if names.fused:
        return found | {"mlp.gate_up_proj.weight": layer.mlp.gate_up}
    gate, up = layer.mlp.gate_up.chunk(2)
    return found | {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}


def _layer_norms(layer: DecoderLayer) -> dict[str, Tensor]:
    """`post_attention_layernorm` is the norm before the MLP, unless the attention's output has one of its own."""
    found: dict[str, Tensor | None] = {
        "input_layernorm": layer.input_norm_E,
        "self_attn.q_norm": layer.q_norm_D,
        "self_attn.k_norm": layer.k_norm_D,
    }
    if layer.post_attention_norm_E is None:
        found["post_attention_layernorm"] = layer.mlp_norm_E
    else:
        found["post_attention_layernorm"] = layer.post_attention_norm_E
        found["pre_feedforward_layernorm"] = layer.mlp_norm_E
        found["post_feedforward_layernorm"] = layer.post_mlp_norm_E
    return {name: weight for name, weight in found.items() if weight is not None}


def _plain(weights: dict[str, Tensor]) -> dict[str, Target]:
    return {name: Target(weight, {name: tuple(weight.shape)}) for name, weight in weights.items()}


def _norms(weights: dict[str, Tensor], names: Names) -> dict[str, Target]:
    transform = _one_more if names.norms_are_offsets else None
    full = {f"{name}.weight": weight for name, weight in weights.items()}
    return {name: Target(w, {name: tuple(w.shape)}, transform=transform) for name, w in full.items()}


def _one_more(weight: Tensor) -> Tensor:
    """In float32 at least: near 1, bfloat16 has steps of 1/128."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
