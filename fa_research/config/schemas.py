"""Typed schemas of every configuration group. No torch here.

Plain enums and mutable `slots` dataclasses, because OmegaConf refuses `Literal` and cannot compose frozen classes,
and `slots` makes an unknown key fail even when it was forced in with `+`. Member names are what users type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fa_research.config.model_schema import Choice, Dtype, ModelConfig
from fa_research.config.yaml_words import accept_truth_values

accept_truth_values()  # here, as every process that composes a config imports the schemas, those of launchers too


class Device(Choice):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class GraphMode(Choice):
    auto = "auto"  # on with CUDA, simulate without
    on = "on"
    off = "off"
    simulate = "simulate"  # static buffers, padding and copies, but no capture


class Level(Choice):
    model = "model"
    attention = "attention"


class L2State(Choice):
    cold = "cold"
    warm = "warm"


class MetadataReuse(Choice):
    shared = "shared"  # built once per pass, for all layers
    per_layer = "per_layer"  # built anew by every layer, as engines do that share none


class TimerKind(Choice):
    events = "events"  # CUDA events around a pass, or around a captured graph
    cupti = "cupti"  # the durations of the kernels themselves, as CUPTI records them


class TrackingMode(Choice):
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
    metadata: MetadataReuse = MetadataReuse.shared
    options: dict[str, Any] = field(default_factory=dict)  # whatever one backend alone understands


@dataclass(slots=True)
class KVConfig:
    page_size: int = 16
    dtype: Dtype = Dtype.auto  # of the cached keys and values; auto: the model's
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
    chunk_size: int | None = None  # new tokens of a request per pass; None: all in one


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
class GenerateWorkload(WorkloadConfig):
    name: str = "generate"
    prompt: str | None = None
    prompt_file: str | None = None  # a file whose text is the prompt, in the place of `prompt`
    generate: int = 200  # the most tokens that follow the prompt
    chunk_size: int | None = None  # tokens of the prompt in one pass; None: all


@dataclass(slots=True)
class TraceWorkload(WorkloadConfig):
    name: str = "trace"
    path: str | None = None  # a trace of requests, Azure's CSV or Mooncake's JSON lines; required
    requests: int = 256  # from the file's beginning
    max_context: int | None = None  # longer requests are cut to it; None: what the model allows
    pool_tokens: int | None = (
        131072  # slots of the pool, at every page size; None: kv.num_pages, kv.memory_fraction
    )
    concurrency: int = 64  # the most requests that are decoded together
    prefix_sharing: bool = True  # equal leading blocks of prompts are stored once
    retained_fraction: float = 0.25  # of the pool, for pages of finished requests that no live one holds
    chunk_size: int = 512  # the most new tokens of the timed extend pass
    steps: int = 16


@dataclass(slots=True)
class MeasureConfig:
    check: bool = True
    quality: bool = True  # of real text: bits per byte, agreement with float32
    check_requests: int = 2
    warmup: int = 3
    repeats: int = 20
    max_seconds: float = 10.0
    l2: L2State = L2State.cold
    timer: TimerKind = TimerKind.events
    self_test: bool = True  # GPU: time what is known first, and refuse to measure where the clock is off
    ledger: bool = True  # what each part of a step costs; they have to add up
    # overrides of a second engine that is timed in turns with this one, as in [backend=triton]; empty: none
    against: list[str] = field(default_factory=list)
    timeout_s: float = 1800.0  # a cell of a sweep that takes longer is stopped, if it is isolated


@dataclass(slots=True)
class SweepConfig:
    """How the cells of a sweep (`-m`) are run; it does not change what they measure."""

    isolate: bool = True  # each in a worker process, which a fault costs and no other cell
    fail_fast: bool = False  # stop at the first cell that is wrong or broken
    exclude: list[str] = field(default_factory=list)  # as in 'backend=fa4,kv.page_size=1': cells to leave out
    report: bool = True  # report.html and figures at the end
    keep_stale: bool = False  # a sweep that goes on keeps the rows of code that has changed since


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
    sweep: SweepConfig = field(default_factory=SweepConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


WORKLOADS: dict[str, type[WorkloadConfig]] = {
    "decode": DecodeWorkload,
    "extend": ExtendWorkload,
    "generate": GenerateWorkload,
    "mixed": MixedWorkload,
    "text": TextWorkload,
    "trace": TraceWorkload,
}
