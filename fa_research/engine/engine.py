"""The parts of one cell, put together from its config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fa_research.backends import AttentionBackend, BackendSettings, choose, create
from fa_research.config import Config, Device, Dtype, GraphMode, Level, MetadataReuse, RopeType
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.cuda_graph import resolve_graph_mode
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.model_runner import EngineModel, ModelRunner
from fa_research.errors import ConfigError
from fa_research.kv_cache import PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool
from fa_research.kv_cache.capacity import choose_num_pages
from fa_research.spec import AttentionSpec

ModelFactory = Callable[[torch.device, torch.dtype], EngineModel]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a workload asks of the engine: the longest each of its requests becomes (tokens), the most tokens of one
    forward pass, and the tokens that the pool holds, where not all requests become their longest at once (None: they
    do)."""

    seq_lens: tuple[int, ...]
    tokens_per_pass: int
    pool_tokens: int | None = None

    @property
    def rope_len(self) -> int:
        """Tokens that rotations are set up for where they depend on the length: those of the run's longest sequence,
        whether it is measured or only written. A run has one rotation, as vLLM has one for a model."""
        return max(self.seq_lens)

    def pages(self, page_size: int) -> int:
        """Pages of the pool, the sink left out: as many whole ones as fit `pool_tokens`, or what all requests take."""
        if self.pool_tokens is not None:
            return max(1, self.pool_tokens // page_size)
        return sum(-(-seq_len // page_size) for seq_len in self.seq_lens)


@dataclass(slots=True)
class Engine:
    """Everything that a workload runs on. `notes` says what was chosen where the config left it open."""

    config: Config
    runner: ModelRunner
    specs: tuple[AttentionSpec, ...]
    device: torch.device
    dtype: torch.dtype
    graph_mode: GraphMode
    notes: list[str] = field(default_factory=list)
    # of the last decode runner: off where the batch passes the captured sizes
    decode_mode: GraphMode | None = None

    @property
    def backend(self) -> AttentionBackend:
        return self.runner.backend

    @property
    def cache(self) -> PagedKVCache:
        return self.runner.cache

    @property
    def kv_dtype(self) -> torch.dtype:
        """That of the cached keys and values."""
        return self.cache.kv.k_LNKD.dtype

    @property
    def stack(self) -> AttentionStack | None:
        """The attention path alone, where `workload.level=attention`."""
        return self.runner.model if isinstance(self.runner.model, AttentionStack) else None

    def decoder(self, batch_size: int, max_seq_len_k: int) -> DecodeRunner:
        """A decode runner for batches of `batch_size`, capturing the sizes of `cuda_graph.batch_sizes` up to the first
        that holds it; greedy unless `sampling.temperature` is above 0."""
        sizes = sorted(self.config.cuda_graph.batch_sizes)
        needed = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < batch_size]
        if self.graph_mode is not GraphMode.off and batch_size > max(sizes):
            self.notes.append(
                f"ran eagerly: batch size {batch_size} is above the largest of cuda_graph.batch_sizes ({max(sizes)})"
            )
            needed = []
        self.decode_mode = self.graph_mode if needed else GraphMode.off
        return DecodeRunner(
            self.runner,
            mode=self.decode_mode,
            batch_sizes=needed,
            max_seq_len_k=max_seq_len_k,
            reserve_ahead=self.config.kv.reserve_ahead,
            sampling=self.config.sampling.temperature > 0,
        )


def resolve_device(config: Config) -> torch.device:
    """The device that `device` names; raises ConfigError for cuda without a GPU."""
    has_cuda = torch.cuda.is_available()
    if config.device is Device.cuda and not has_cuda:
        raise ConfigError("device=cuda: torch sees no CUDA device here; use device=cpu or device=auto")
    if config.device is Device.cpu or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on the CPU."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved: torch.dtype = getattr(torch, dtype.value)
    return resolved


def kv_dtype_of(config: Config, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of the cache; `kv.dtype=auto` is the model's, `dtype`."""
    return dtype if config.kv.dtype is Dtype.auto else resolve_dtype(config.kv.dtype, device)


def create_backend(
    config: Config, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype, notes: list[str]
) -> AttentionBackend:
    """The backend that the config names, `auto` resolved and noted."""
    settings = BackendSettings(
        device=device,
        dtype=dtype,
        page_size=config.kv.page_size,
        max_context_len=config.model.max_context_len,
        provider=config.backend.provider,
        kv_dtype=kv_dtype_of(config, dtype, device),
        num_splits=config.backend.num_splits,
        deterministic=config.backend.deterministic,
        metadata_per_layer=config.backend.metadata is MetadataReuse.per_layer,
        options=config.backend.options,
    )
    if config.backend.name == "auto":
        backend, because = choose(settings, specs)
        notes.append(f"backend=auto chose {backend.name}: {because}")
    else:
        backend = create(config.backend.name, settings, specs)
    notes += backend.notes
    return backend


def create_cache(
    config: Config, needs: Needs, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype
) -> PagedKVCache:
    """Pools for the workload, churned as a used allocator would leave them unless `kv.churn=false`."""
    kv, spec = config.kv, specs[0]
    max_requests, context_len = _table_shape(config, needs)
    shape = {
        "num_layers": len(specs),
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "v_head_dim": spec.v_head_dim,
        "dtype": kv_dtype_of(config, dtype, device),
    }
    num_pages = choose_num_pages(
        kv,
        bytes_per_page=TokenToKVPool.bytes_per_page(kv.page_size, **shape),  # type: ignore[arg-type]
        pages_needed=needs.pages(kv.page_size),
        device=device,
    )
    allocator = PagedAllocator(num_pages, kv.page_size)
    if kv.churn:
        allocator.churn(config.seed)
    table = ReqToTokenPool(max_requests, context_len, page_size=kv.page_size, device=device)
    pool = TokenToKVPool(num_pages, kv.page_size, device=device, **shape)  # type: ignore[arg-type]
    debug = config.debug
    return PagedKVCache(table, allocator, pool, check_invariants=debug.check_invariants, poison=debug.poison)


def _table_shape(config: Config, needs: Needs) -> tuple[int, int]:
    """Requests and tokens a request that the table has room for; raises ConfigError where the workload exceeds them."""
    context_len, num_requests = max(needs.seq_lens), len(needs.seq_lens)
    if context_len > config.model.max_context_len:
        raise ConfigError(
            f"the workload needs a context of {context_len} tokens, model.max_context_len is "
            f"{config.model.max_context_len}; shorten the workload or choose a model with a longer context"
        )
    max_requests = config.kv.max_requests or num_requests
    if max_requests < num_requests:
        raise ConfigError(
            f"kv.max_requests={max_requests}: the workload has {num_requests} requests at once; "
            "give at least as many, or leave it out"
        )
    return max_requests, context_len


def rope_notes(config: Config, needs: Needs) -> list[str]:
    """Which rotation the model gets where its RoPE depends on the length: chosen once, for the longest sequence of the
    run, as keys in the cache stay rotated as they are. Shorter sequences have it too, and the note says so."""
    scaling, longest = config.model.rope_scaling, needs.rope_len
    original = scaling.original_max_position
    reach = (
        "for every sequence of this run; the longest, written text included, "
        f"reaches {longest} of {original} tokens"
    )
    if config.workload.level is not Level.model:
        return []
    if scaling.type is RopeType.longrope:
        factors = "long" if longest > original else "short"
        return [f"LongRoPE: {factors} factors {reach}"]
    if scaling.type is RopeType.dynamic:
        return [f"dynamic NTK RoPE: the base for {max(longest, original)} tokens {reach}"]
    return []


def build_engine(
    config: Config,
    needs: Needs,
    specs: Sequence[AttentionSpec],
    device: torch.device,
    make_model: ModelFactory,
) -> Engine:
    """Backend first, since it may refuse, then memory, then the model, then how decode steps run."""
    notes: list[str] = []
    dtype = resolve_dtype(config.model.dtype, device)
    backend = create_backend(config, specs, device, dtype, notes)
    per_layer = backend.settings.metadata_per_layer
    graph_mode = resolve_graph_mode(
        config.cuda_graph, device, backend.capabilities, backend.name, metadata_per_layer=per_layer
    )
    notes += rope_notes(config, needs)
    model = make_model(device, dtype)
    notes += model.notes
    cache = create_cache(config, needs, specs, device, dtype)
    return Engine(config, ModelRunner(model, backend, cache), tuple(specs), device, dtype, graph_mode, notes)
