"""What a cell takes at least, in requests and in bytes, from its config alone. No torch.

Nothing is counted that a backend might do without, so a cell that needs more than there is cannot run. The dtype
`auto` depends on the device, so callers say whether it is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa_research.config.model_schema import Dtype, ModelConfig
from fa_research.config.schemas import (
    Config,
    DecodeWorkload,
    ExtendWorkload,
    GenerateWorkload,
    KVConfig,
    Level,
    MixedWorkload,
    TextWorkload,
    TraceWorkload,
)

_ITEM_BYTES = {Dtype.float16: 2, Dtype.bfloat16: 2, Dtype.float32: 4}
_NORM_BYTES = 4  # norm weights and rotations are float32
_PAGE_HOST_BYTES = 48  # a page in the allocator's lists: two pointers and an int
_REQUEST_HOST_BYTES = 200  # a request with its lists of pages and lengths


@dataclass(frozen=True, slots=True)
class Work:
    """What a workload asks of the engine at least: requests at once, tokens of the longest, pages of the pool (the sink
    left out), new tokens of the largest pass, and requests that get logits in it."""

    requests: int
    longest: int
    pages: int
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Least bytes of a cell on its device, and on the host beside it. The peak is that of one pass or of the check,
    whichever is larger; it comes on top of the rest."""

    weights: int
    pool: int
    table: int
    peak: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.pool + self.table + self.peak

    @property
    def resident(self) -> int:
        """What stays as long as the engine does."""
        return self.weights + self.pool + self.table


def least_work(config: Config) -> Work | None:
    """The sizes of the workload; None for one that a plugin adds, which only its own code knows."""
    page_size, warmup, options = config.kv.page_size, config.measure.warmup, config.workload

    def pages(length: int) -> int:
        return -(-length // page_size)

    match options:
        case DecodeWorkload(name="decode"):
            count, steps = options.batch_size, max(options.steps, warmup)
            longest = options.context_len + steps
            shortest = max(1, round(options.context_len * (1 - options.length_spread))) + steps
            work = Work(count, longest, pages(longest) + (count - 1) * pages(shortest), count, count)
        case ExtendWorkload(name="extend"):
            count, longest = options.batch_size, options.prefix_len + options.new_len
            chunk = min(options.new_len, options.chunk_size or options.new_len)
            work = Work(count, longest, count * pages(longest), count * chunk, count)
        case MixedWorkload(name="mixed"):
            extended, decoded = options.extend_requests, options.decode_requests
            lens = options.prefix_len + options.new_len, options.context_len + 1
            total = extended * pages(lens[0]) + decoded * pages(lens[1])
            count = extended + decoded
            work = Work(count, max(lens), total, extended * options.new_len + decoded, count)
        case TextWorkload(name="text"):
            work = _text(options, page_size, warmup, shown=options.level is Level.model)
        case GenerateWorkload(name="generate"):
            # The prompt has a token at least, and the last one that is written is not read again.
            work = Work(1, options.generate, pages(options.generate), 1, 1)
        case TraceWorkload(name="trace"):
            # The trace's lengths are not known before it is read.
            work = Work(2 * options.concurrency, 1, max(1, (options.pool_tokens or 1) // page_size), 1, 1)
        case _:
            return None
    return replace(work, pages=max(work.pages, config.kv.num_pages or 0))


def _text(options: TextWorkload, page_size: int, warmup: int, shown: bool) -> Work:
    count = options.batch_size
    lens = [options.prompt_len + max(options.steps, warmup)] * min(count, 1)
    rest = [max(1, options.shared_prefix_len), options.prompt_len + options.steps]
    if shown and options.generate:
        rest.append(options.generate)  # the prompt comes on top; its tokens are not counted yet
    pages = count * -(-lens[0] // page_size) + sum(-(-length // page_size) for length in rest)
    chunk = min(options.chunk_size, options.prompt_len - options.shared_prefix_len)
    return Work(count + len(rest), max(lens + rest), pages, count * chunk, count)


def weight_counts(model: ModelConfig) -> tuple[int, int, int]:
    """Weights outside the layers, and of one layer, in the model's dtype; then all norm weights, which are float32."""
    hidden, moe = model.hidden_size, model.moe
    heads = model.num_heads + 2 * model.num_kv_heads
    layer = heads * model.head_dim * hidden + hidden * model.num_heads * model.head_dim
    layer += heads * model.head_dim * model.qkv_bias + hidden * model.o_bias + model.num_heads * model.sink
    layer += max(1, moe.num_experts) * 3 * model.intermediate_size * hidden
    if moe.num_experts:
        layer += moe.num_experts * hidden
        layer += moe.bias * moe.num_experts * (1 + 2 * model.intermediate_size + hidden)
    outside = model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2)
    norms = hidden * (4 if model.post_norms else 2) + 2 * model.head_dim * model.qk_norm
    return outside, layer, model.num_layers * norms + hidden


def least_memory(config: Config, on_gpu: bool) -> Memory | None:
    """The least bytes of a cell; None for a workload that a plugin adds."""
    work, model = least_work(config), config.model
    if work is None:
        return None
    item = item_bytes(model.dtype, on_gpu)
    layers, alone = model.num_layers, config.workload.level is Level.attention
    if alone and config.workload.num_layers is not None:
        layers = config.workload.num_layers
    kv_item = item if config.kv.dtype is Dtype.auto else item_bytes(config.kv.dtype, on_gpu)
    slot = 2 * layers * model.num_kv_heads * model.head_dim * kv_item
    table = (max(work.requests, config.kv.max_requests or 0) + 1) * 4
    host = work.pages * _PAGE_HOST_BYTES + work.requests * _REQUEST_HOST_BYTES
    weights, peak = (_attention_path if alone else _model)(config, work, item, layers)
    return Memory(
        weights=weights,
        pool=(work.pages + 1) * config.kv.page_size * slot,
        table=table * padded_length(work.longest, config.kv),
        peak=peak,
        host=host,
    )


def _model(config: Config, work: Work, item: int, layers: int) -> tuple[int, int]:
    """Bytes of the weights with their tables of rotations, and of the peak."""
    model = config.model
    outside, layer, norms = weight_counts(model)
    tables = 2 if model.local.rope_theta is not None and any(model.local.pattern) else 1
    weights = (outside + layers * layer) * item + norms * _NORM_BYTES
    weights += tables * model.max_context_len * model.head_dim * _NORM_BYTES
    # One layer's MLP: the residual stream, gate and up, their product. Only the last layer computes fewer tokens.
    width = model.hidden_size + (0 if model.moe.num_experts else 3 * model.intermediate_size)
    tokens = work.tokens if layers > 1 else work.rows
    activations = max(tokens * width, work.rows * model.vocab_size) * item
    oracle = (outside + layer) * 8 if config.measure.check else 0  # float64, one layer at a time
    return weights, max(activations, oracle)


def _attention_path(config: Config, work: Work, item: int, layers: int) -> tuple[int, int]:
    """Bytes of the queries, keys and values that stand for a model, and of the outputs of every layer."""
    model = config.model
    heads = model.num_heads + 2 * model.num_kv_heads
    token = model.head_dim * item
    return work.tokens * heads * token, work.tokens * layers * model.num_heads * token


def padded_length(length: int, kv: KVConfig) -> int:
    """Slots of a row of the table: whole pages."""
    return -(-length // kv.page_size) * kv.page_size


def item_bytes(dtype: Dtype, on_gpu: bool) -> int:
    """Bytes of one number; `auto` is bfloat16 on a GPU and float32 on the CPU."""
    return (2 if on_gpu else 4) if dtype is Dtype.auto else _ITEM_BYTES[dtype]
