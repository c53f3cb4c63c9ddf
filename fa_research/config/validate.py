"""Checks that need more than one value, or more than a type. All problems of a config are reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fa_research.config.limits import at_least, positive
from fa_research.config.model_schema import ModelConfig
from fa_research.config.schemas import (
    Config,
    CudaGraphConfig,
    DecodeWorkload,
    ExtendWorkload,
    GenerateWorkload,
    GraphMode,
    KVConfig,
    Level,
    MeasureConfig,
    MixedWorkload,
    SamplingConfig,
    TextWorkload,
    TraceWorkload,
    WorkloadConfig,
)
from fa_research.config.validate_model import model_problems
from fa_research.errors import ConfigError

MAX_PAGE_SIZE = 256
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


def validate(config: Config) -> None:
    """Raises ConfigError with every problem of `config`; each names its key, what was given and what would work."""
    problems = [
        *_root(config),
        *model_problems(config.model),
        *_kv(config.kv),
        *_cuda_graph(config.cuda_graph),
        *_measure(config.measure),
        *_workload(config.workload, config.model),
        *_pool(config.workload, config.kv),
        *_sampling(config.sampling),
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def study_problem(study: str) -> str | None:
    """What is wrong with a study's name, which is also its folder's."""
    if re.fullmatch(r"\w[\w.-]*", study):
        return None
    return f"study={study!r}: names a folder, so use letters, digits, dots, dashes and underscores"


def _root(config: Config) -> Iterator[str]:
    if problem := study_problem(config.study):
        yield problem
    if problem := seed_problem("seed", config.seed):
        yield problem
    yield from at_least("backend.num_splits", config.backend.num_splits, 0)


def _kv(kv: KVConfig) -> Iterator[str]:
    if not 1 <= kv.page_size <= MAX_PAGE_SIZE:
        yield f"kv.page_size={kv.page_size}: must be from 1 to {MAX_PAGE_SIZE} slots"
    if kv.num_pages is not None and kv.memory_fraction is not None:
        yield (
            f"kv.num_pages={kv.num_pages} and kv.memory_fraction={kv.memory_fraction}: "
            "give one of the two, or neither for what the workload needs"
        )
    if kv.num_pages is not None and kv.num_pages < 1:
        yield f"kv.num_pages={kv.num_pages}: must be at least 1 (the sink page comes on top)"
    if kv.memory_fraction is not None and not 0 < kv.memory_fraction <= 1:
        yield f"kv.memory_fraction={kv.memory_fraction}: must be above 0 and at most 1"
    yield from at_least("kv.max_requests", kv.max_requests, 1)
    yield from at_least("kv.reserve_ahead", kv.reserve_ahead, 1)


def _cuda_graph(graph: CudaGraphConfig) -> Iterator[str]:
    sizes = graph.batch_sizes
    if not sizes and graph.mode is not GraphMode.off:
        yield "cuda_graph.batch_sizes=[]: give at least one batch size, or cuda_graph.mode=off"
    if any(size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
        yield f"cuda_graph.batch_sizes={sizes}: must be positive and without repeats"


def sampling_problems(temperature: float, top_k: int, top_p: float, min_p: float) -> Iterator[str]:
    """What is wrong with how a request's tokens are to be drawn."""
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        yield (
            f"sampling.temperature={temperature}: must be 0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        )
    if not 0 <= top_k < 2**31:
        yield f"sampling.top_k={top_k}: must be 0 (all) or a number of tokens below 2**31"
    if not 0 < top_p <= 1:
        yield f"sampling.top_p={top_p}: must be above 0 and at most 1 (all)"
    if not 0 <= min_p <= 1:
        yield f"sampling.min_p={min_p}: must be from 0 (all) to 1"


def seed_problem(key: str, seed: int) -> str | None:
    """What is wrong with a seed."""
    return None if 0 <= seed < 2**63 else f"{key}={seed}: must be from 0 to 2**63 - 1"


def _sampling(sampling: SamplingConfig) -> Iterator[str]:
    yield from sampling_problems(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if sampling.seed is not None and (problem := seed_problem("sampling.seed", sampling.seed)):
        yield problem


def _measure(measure: MeasureConfig) -> Iterator[str]:
    yield from at_least("measure.check_requests", measure.check_requests, 1)
    yield from at_least("measure.warmup", measure.warmup, 0)
    yield from at_least("measure.repeats", measure.repeats, 1)
    yield from positive("measure.max_seconds", measure.max_seconds)
    yield from positive("measure.timeout_s", measure.timeout_s)


def _workload(workload: WorkloadConfig, model: ModelConfig) -> Iterator[str]:
    yield from _level(workload, model)
    match workload:
        case DecodeWorkload():
            yield from _sizes(workload, "batch_size context_len steps")
            if not 0 <= workload.length_spread < 1:
                yield f"workload.length_spread={workload.length_spread}: must be at least 0 and below 1"
            yield from _fits(workload, model, "context_len steps")
        case ExtendWorkload():
            yield from _sizes(workload, "batch_size new_len")
            yield from at_least("workload.prefix_len", workload.prefix_len, 0)
            yield from at_least("workload.chunk_size", workload.chunk_size, 1)
            yield from _fits(workload, model, "prefix_len new_len")
        case MixedWorkload():
            yield from _sizes(workload, "extend_requests new_len decode_requests context_len")
            yield from at_least("workload.prefix_len", workload.prefix_len, 0)
            yield from _fits(workload, model, "prefix_len new_len")
            yield from _fits(workload, model, "context_len", extra=1)
        case TextWorkload():
            yield from _text(workload, model)
        case GenerateWorkload():
            yield from _generate(workload, model)
        case TraceWorkload():
            yield from _trace(workload, model)


def _level(workload: WorkloadConfig, model: ModelConfig) -> Iterator[str]:
    if workload.num_layers is None:
        return
    if workload.level is not Level.attention:
        yield (
            f"workload.num_layers={workload.num_layers}: only with workload.level=attention; "
            "a whole model has model.num_layers"
        )
    elif not 1 <= workload.num_layers <= model.num_layers:
        yield f"workload.num_layers={workload.num_layers}: must be from 1 to model.num_layers={model.num_layers}"


def _text(workload: TextWorkload, model: ModelConfig) -> Iterator[str]:
    yield from _sizes(workload, "batch_size prompt_len chunk_size steps")
    if workload.prompt_len >= 1 and not 0 <= workload.shared_prefix_len < workload.prompt_len:
        yield (
            f"workload.shared_prefix_len={workload.shared_prefix_len}: must be from 0 to "
            f"workload.prompt_len - 1 = {workload.prompt_len - 1}, so that each prompt has a token of its own"
        )
    yield from _fits(workload, model, "prompt_len steps")
    yield from at_least("workload.generate", workload.generate, 0)
    if workload.generate > 0 and workload.level is Level.model and workload.prompt is None:
        yield from _fits(workload, model, "prompt_len generate")


def _generate(workload: GenerateWorkload, model: ModelConfig) -> Iterator[str]:
    if workload.level is Level.attention:
        yield (
            "workload.level=attention: the attention path alone writes no text; use workload.level=model, or "
            "workload=decode to time the attention of decode steps"
        )
    yield from _sizes(workload, "generate")
    yield from at_least("workload.chunk_size", workload.chunk_size, 1)
    if workload.prompt is None and workload.prompt_file is None:
        yield "workload.prompt=null: give a prompt, or the file of one in workload.prompt_file"
    yield from _fits(workload, model, "generate", extra=1)


def _trace(workload: TraceWorkload, model: ModelConfig) -> Iterator[str]:
    yield from _sizes(workload, "requests concurrency chunk_size steps")
    yield from at_least("workload.pool_tokens", workload.pool_tokens, MAX_PAGE_SIZE)
    if not 0 <= workload.retained_fraction < 1:
        yield f"workload.retained_fraction={workload.retained_fraction}: must be at least 0 and below 1"
    yield from at_least("workload.max_context", workload.max_context, 2)
    if workload.max_context is None:
        yield from _fits(workload, model, "steps", extra=2)
    else:
        yield from _fits(workload, model, "max_context steps")


def _pool(workload: WorkloadConfig, kv: KVConfig) -> Iterator[str]:
    """A replay's pool has one size, wherever it comes from."""
    if not isinstance(workload, TraceWorkload):
        return
    sizes = {"kv.num_pages": kv.num_pages, "kv.memory_fraction": kv.memory_fraction}
    given = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    if workload.pool_tokens is None and not given:
        yield "workload.pool_tokens=null: give it, kv.num_pages or kv.memory_fraction, the size of the pool"
    elif workload.pool_tokens is not None and given:
        yield f"workload.pool_tokens={workload.pool_tokens} and {given[0]}: give one of the two (null for none)"


def _sizes(workload: WorkloadConfig, names: str) -> Iterator[str]:
    for name in names.split():
        yield from at_least(f"workload.{name}", getattr(workload, name), 1)


def _fits(workload: WorkloadConfig, model: ModelConfig, names: str, extra: int = 0) -> Iterator[str]:
    """The longest request against the model's limit; `extra` counts tokens that no key names."""
    parts = [(name, getattr(workload, name)) for name in names.split()]
    total = sum(value for _, value in parts) + extra
    if total > model.max_context_len:
        terms = " + ".join(f"workload.{name}={value}" for name, value in parts) + (
            f" + {extra}" if extra else ""
        )
        yield f"{terms} = {total} tokens: must be at most model.max_context_len={model.max_context_len}"
