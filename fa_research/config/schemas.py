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
    llama3 = "llama3"


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
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(slots=True)
class MaskConfig:
    name: str = "causal"
    # tokens: window of sliding_window, chunk of chunked; None for the masks without a size
    size: int | None = None


@dataclass(slots=True)
class ModelConfig:
    name: str = "tiny"
    path: str | None = None  # a Hugging Face folder, which then says all but `name` and `dtype`
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
    dtype: Dtype = Dtype.auto
    mask: MaskConfig = field(default_factory=MaskConfig)
    softcap: float = 0.0
    sink: bool = False


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


@dataclass(slots=True)
class MeasureConfig:
    check: bool = True
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
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


WORKLOADS: dict[str, type[WorkloadConfig]] = {
    "decode": DecodeWorkload,
    "extend": ExtendWorkload,
    "mixed": MixedWorkload,
    "text": TextWorkload,
}
