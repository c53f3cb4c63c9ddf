"""The schema of the group `model`: everything that tells one decoder from another. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Choice(Enum):
    """An enum that prints as what the user typed."""

    def __str__(self) -> str:
        return str(self.value)


class Dtype(Choice):
    auto = "auto"  # bfloat16 with CUDA, float32 without
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class RopeType(Choice):
    none = "none"
    linear = "linear"
    dynamic = "dynamic"
    llama3 = "llama3"
    yarn = "yarn"
    longrope = "longrope"


class Activation(Choice):
    silu = "silu"
    gelu_tanh = "gelu_tanh"
    swiglu_clamped = "swiglu_clamped"  # gpt-oss: gate * sigmoid(1.702 gate) * (up + 1), both clamped at 7


@dataclass(slots=True)
class RopeScaling:
    type: RopeType = RopeType.none
    factor: float = 8.0
    original_max_position: int = 8192  # tokens; the context that the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # yarn, longrope: on queries and keys; None: from the factor
    short_factor: list[float] = field(default_factory=list)  # longrope: one for each pair of dimensions
    long_factor: list[float] = field(default_factory=list)


@dataclass(slots=True)
class MaskConfig:
    name: str = "causal"
    # tokens: window of sliding_window and streaming, chunk of chunked; None for the masks without a size
    size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the mask's other fields


@dataclass(slots=True)
class LocalConfig:
    """Layers that see less than the others (Gemma, gpt-oss, Llama 4)."""

    pattern: list[bool] = field(
        default_factory=list
    )  # layer i is local if pattern[i % len(pattern)]; []: none
    mask: MaskConfig = field(default_factory=lambda: MaskConfig("sliding_window", 1024))
    rope_theta: float | None = None  # a rotation of their own, without scaling; None: that of the others


@dataclass(slots=True)
class MoEConfig:
    """A mixture of experts in the place of the MLP; `model.intermediate_size` is that of one expert."""

    num_experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 2
    norm_topk_prob: bool = True  # the weights of the chosen experts sum to 1
    bias: bool = False  # of the router and of the experts (gpt-oss)


@dataclass(slots=True)
class ModelConfig:
    name: str = "tiny"
    path: str | None = None  # a Hugging Face folder, which then says all but `name` and `dtype`
    architecture: str = "LlamaForCausalLM"  # transformers' name; with a path, what config.json says
    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 384
    vocab_size: int = 256
    max_context_len: int = 4096
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    post_norms: bool = False  # of the attention's and the MLP's outputs too, before they are added (Gemma)
    activation: Activation = Activation.silu
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0  # of the head's logits; 0: none
    dtype: Dtype = Dtype.auto
    mask: MaskConfig = field(default_factory=MaskConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float = 0.0  # of the scores; 0: none
    sink: bool = False
    moe: MoEConfig = field(default_factory=MoEConfig)
    changed: list[str] | None = None  # filled in with a path: keys whose values are not the folder's
