"""Typed schemas of every configuration group. No torch here.

Plain enums and mutable `slots` dataclasses, because OmegaConf refuses `Literal` and cannot compose frozen classes,
and `slots` makes an unknown key fail even when it was forced in with `+`. Member names are what users type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class _Choice(Enum):
    """An enum that prints as what the user typed."""

    def __str__(self) -> str:
        return str(self.value)


class Device(_Choice):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(_Choice):
    auto = "auto"  # bfloat16 with CUDA, float32 without
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class RopeType(_Choice):
    none = "none"
    linear = "linear"
    dynamic = "dynamic"
    llama3 = "llama3"
    yarn = "yarn"
    longrope = "longrope"


class Activation(_Choice):
    silu = "silu"
    gelu_tanh = "gelu_tanh"
    swiglu_clamped = "swiglu_clamped"  # gpt-oss: gate * sigmoid(1.702 gate) * (up + 1), both clamped at 7


class GraphMode(_Choice):
    auto = "auto"  # on with CUDA, simulate without
    on = "on"
    off = "off"
    simulate = "simulate"  # static buffers, padding and copies, but no capture


class Level(_Choice):
    model = "model"
    attention = "attention"


class L2State(_Choice):
    cold = "cold"
    warm = "warm"


class TrackingMode(_Choice):
    auto = "auto"  # online if a W&B key is configured, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(slots=True)
class BackendConfig:
    name: str = "auto"
    provider: str | None = None  # pins one package that offers the kernels; None: the first one installed
    num_splits: int = 0  # KV splits of decode; 0: chosen by the backend
    deterministic: bool = False  # bitwise the same result for a request alone and in a batch
    options: dict[str, Any] = field(default_factory=dict)  # whatever one backend alone understands


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
    # tokens: window of sliding_window, chunk of chunked; None for the masks without a size
    size: int | None = None


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


@dataclass(slots=True)
class KVConfig:
    page_size: int = 16
    num_pages: int | None = None  # neither this nor memory_fraction: what the workload needs
    memory_fraction: float | None = None  # of the memory free on the device
    max_requests: int | None = None
    reserve_ahead: int = 16  # tokens reserved ahead of each decoding request
    churn: bool = True  # page tables as a used allocator leaves them, not arange


@dataclass(slots=True)
class CudaGraphConfig:
    mode: GraphMode = GraphMode.auto
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])


@dataclass(slots=True)
class SamplingConfig:
    """How tokens are chosen from logits; request i draws from a stream of its own, `seed + i`."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    min_p: float = 0.0  # of the likeliest token's probability; 0: all
    seed: int | None = None  # None: the run's seed


@dataclass(slots=True)
class WorkloadConfig:
    name: str = "text"
    level: Level = Level.model
    num_layers: int | None = None  # level=attention: how many layers to run; None: all


@dataclass(slots=True)
class DecodeWorkload(WorkloadConfig):
    name: str = "decode"
    batch_size: int = 8
    context_len: int = 512
    steps: int = 16
    # 0: all requests alike; 0.5: lengths from half of context_len up to context_len
    length_spread: float = 0.0


@dataclass(slots=True)
class ExtendWorkload(WorkloadConfig):
    name: str = "extend"
    batch_size: int = 4
    new_len: int = 512
    prefix_len: int = 0


@dataclass(slots=True)
class MixedWorkload(WorkloadConfig):
    name: str = "mixed"
    extend_requests: int = 2
    new_len: int = 256
    prefix_len: int = 0
    decode_requests: int = 6
    context_len: int = 512


@dataclass(slots=True)
class TextWorkload(WorkloadConfig):
    name: str = "text"
    path: str | None = None  # a file or folder of text; None: the Python standard library's own sources
    batch_size: int = 4
    prompt_len: int = 256
    shared_prefix_len: int = 128
    chunk_size: int = 96
    steps: int = 32
    generate: int = 0  # tokens of text to show, following `prompt`; not with level=attention
    prompt: str | None = None  # None: the text's beginning


@dataclass(slots=True)
class MeasureConfig:
    check: bool = True
    quality: bool = True  # of real text: bits per byte, agreement with float32
    check_requests: int = 2
    warmup: int = 3
    repeats: int = 20
    max_seconds: float = 10.0
    l2: L2State = L2State.cold


@dataclass(slots=True)
class TrackingConfig:
    mode: TrackingMode = TrackingMode.auto
    project: str = "fa_research"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    progress: bool = True


@dataclass(slots=True)
class DebugConfig:
    check_invariants: bool = False
    poison: bool = False  # NaN in page 0 and in every unused slot


@dataclass(slots=True)
class Config:
    study: str = "default"
    seed: int = 0
    device: Device = Device.auto
    backend: BackendConfig = field(default_factory=BackendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    cuda_graph: CudaGraphConfig = field(default_factory=CudaGraphConfig)
    workload: WorkloadConfig = field(default_factory=TextWorkload)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


WORKLOADS: dict[str, type[WorkloadConfig]] = {
    "decode": DecodeWorkload,
    "extend": ExtendWorkload,
    "mixed": MixedWorkload,
    "text": TextWorkload,
}
