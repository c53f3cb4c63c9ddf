"""What an architecture's name says that its config.json may leave out: the defaults of transformers, and which keys it
reads. No torch.

Source: the configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fa_research.config.model_schema import Activation, MoEConfig

# Keys that change the result for an architecture that reads them. Where a family does not say that it does (`reads`), a
# value other than null, false, 0 or empty is refused.
RESULT_KEYS = (
    "quantization_config", "compression_config", "attention_bias", "mlp_bias", "num_experts", "num_local_experts",
    "n_routed_experts", "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size",
    "no_rope_layers", "is_encoder_decoder", "add_cross_attention", "text_config", "use_bidirectional_attention",
    "per_layer_config", "mlp_only_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Defaults, and what is not a key at all.

    Attributes:
        reads: keys that not every family reads: those of `RESULT_KEYS` that are taken over, and `norm_topk_prob`
            and `sliding_window_pattern`.
        intermediate_size, moe_intermediate_size: the key's name, and its default if it has one.
        head_dim: None: hidden size / heads.
        kv_heads_are_heads: where the key is absent; otherwise it has to be there.
        windows: which layers have one, if `layer_types` does not say: `none`; `all`; `last`, those from
            `max_window_layers` on; `period`, all but each `period`-th.
        layer_types: read, rather than refused where it says anything else.
        window_switch: only if `use_sliding_window` is true.
        rope_scaling: where config.json has none.
        original_max_position: the default of a key beside the RoPE table, which comes before the table's.
        local_rope_theta: windowed layers have a rotation of their own.
        gemma: norms after attention and MLP too, a scaled embedding, a scale of the scores and caps that are keys.
        softcap, logit_softcap: defaults of the caps of scores and logits, with `gemma`. Where `softcap` is None, the
            key of the scores' cap is in the config of transformers, but no attention layer applies it.
        rope_types: those that the configuration class accepts; None: every type that is supported here.
        moe: experts instead of the MLP, with the defaults of their keys.
        quant_methods: of `quantization_config`, what the loader undoes.
    """

    reads: tuple[str, ...] = ()
    intermediate_size: str = "intermediate_size"
    moe_intermediate_size: int | None = None
    head_dim: int | None = None
    kv_heads_are_heads: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False  # of q, k, v and o
    sink: bool = False
    activation_key: str = "hidden_act"
    activation: Activation = Activation.silu
    windows: str = "none"
    layer_types: bool = False
    window_switch: bool = False
    sliding_window: int | None = 4096
    period: int = 0
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    local_rope_theta: float | None = None
    original_max_position: int | None = None
    rope_types: tuple[str, ...] | None = None
    longrope_names: tuple[str, ...] = ("longrope",)
    gemma: bool = False
    softcap: float | None = None
    logit_softcap: float | None = None
    moe: MoEConfig | None = None
    quant_methods: tuple[str, ...] = ()


_GEMMA = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping")
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(reads=("attention_bias",), kv_heads_are_heads=True),
    "MistralForCausalLM": Family(windows="all"),
    "MinistralForCausalLM": Family(windows="all", layer_types=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="last", layer_types=True, window_switch=True),
    "Qwen3ForCausalLM": Family(
        reads=("attention_bias",), head_dim=128, qk_norm=True,
        windows="last", layer_types=True, window_switch=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        reads=("attention_bias", "num_experts", "num_local_experts", "norm_topk_prob"),
        intermediate_size="moe_intermediate_size", moe_intermediate_size=768, qk_norm=True,
        windows="all", window_switch=True,
        moe=MoEConfig(num_experts=128, experts_per_token=8, norm_topk_prob=False),
    ),
    "MixtralForCausalLM": Family(
        reads=("num_experts", "num_local_experts"), rms_norm_eps=1e-5, rope_theta=1e6,
        windows="all", sliding_window=None, moe=MoEConfig(num_experts=8, experts_per_token=2),
    ),
    "Gemma2ForCausalLM": Family(
        reads=_GEMMA, gemma=True, head_dim=256, tie_word_embeddings=True, softcap=50.0, logit_softcap=30.0,
        activation_key="hidden_activation", activation=Activation.gelu_tanh,
        windows="period", period=2, layer_types=True,
    ),
    "Gemma3ForCausalLM": Family(
        reads=(*_GEMMA, "sliding_window_pattern"), gemma=True, head_dim=256, tie_word_embeddings=True,
        qk_norm=True, activation_key="hidden_activation", activation=Activation.gelu_tanh,
        windows="period", period=6, layer_types=True, rope_theta=1e6, local_rope_theta=10000.0,
    ),
    "GptOssForCausalLM": Family(
        reads=("attention_bias", "num_experts", "num_local_experts"),
        head_dim=64, rms_norm_eps=1e-5, attention_bias=True, sink=True, activation=Activation.swiglu_clamped,
        windows="period", period=2, layer_types=True, sliding_window=128, rope_theta=150000.0,
        rope_scaling={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        moe=MoEConfig(num_experts=128, experts_per_token=4, bias=True), quant_methods=("mxfp4",),
    ),
    "Phi3ForCausalLM": Family(
        kv_heads_are_heads=True, rms_norm_eps=1e-5, windows="all", sliding_window=None, original_max_position=4096,
        rope_types=("default", "longrope"), longrope_names=("longrope", "su", "yarn"),
    ),
}  # fmt: skip
