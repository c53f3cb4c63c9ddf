"""Keys that were set and change nothing in this run, as data: which keys, when, and why. No torch.

A key counts as set where the command line or the preset (`experiment=`) names it; what a group's file says does not
count. Keys whose value cannot be honoured are errors (`validate`, the backends); those here are valid and idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fa_research.config.model_schema import RopeType
from fa_research.config.schemas import (
    Config,
    DecodeWorkload,
    ExtendWorkload,
    GenerateWorkload,
    GraphMode,
    L2State,
    Level,
    MixedWorkload,
    TextWorkload,
    TraceWorkload,
    TrackingMode,
)


@dataclass(frozen=True, slots=True)
class Run:
    """What the conditions look at. `on_gpu`: whether the cell runs on a CUDA device; `multirun`: it is part of a
    sweep."""

    config: Config
    multirun: bool
    on_gpu: bool


@dataclass(frozen=True, slots=True)
class Idle:
    """`keys` (separated by blanks; a group stands for all keys in it) change nothing where `when` holds."""

    keys: str
    when: Callable[[Run], bool]
    why: str


def _ragged(run: Run) -> bool:
    return isinstance(run.config.workload, ExtendWorkload | MixedWorkload)


def _attention(run: Run) -> bool:
    return run.config.workload.level is Level.attention


def _writes_no_text(run: Run) -> bool:
    workload = run.config.workload
    return isinstance(workload, TextWorkload) and (workload.generate == 0 or _attention(run))


def _generates(run: Run) -> bool:
    return isinstance(run.config.workload, GenerateWorkload)


def _not_rope(*types: RopeType) -> Callable[[Run], bool]:
    """Whether the model's rotation is scaled, and by none of these types."""

    def when(run: Run) -> bool:
        kind = run.config.model.rope_scaling.type
        return kind is not RopeType.none and kind not in types

    return when


# A model's keys that reach the attention path alone through no `AttentionSpec`.
_NOT_ATTENTION = (
    "model.hidden_size model.intermediate_size model.vocab_size model.rope_theta model.rope_scaling "
    "model.local.rope_theta model.rms_norm_eps model.tie_word_embeddings model.qk_norm model.qkv_bias model.o_bias "
    "model.post_norms model.activation model.embedding_scale model.logit_softcap model.moe"
)

IDLE: tuple[Idle, ...] = (
    # Hydra and the sweep
    Idle("hydra.sweep hydra.launcher hydra.sweeper", lambda r: not r.multirun, "only a sweep (-m) reads it"),
    Idle("hydra.run.dir", lambda r: r.multirun, "the folder of a sweep is hydra.sweep.dir"),
    Idle(
        "sweep.isolate sweep.fail_fast sweep.exclude sweep.report",
        lambda r: not r.multirun,
        "only a sweep (-m) reads it",
    ),
    Idle("measure.timeout_s", lambda r: not r.multirun, "only cells of a sweep (-m) are stopped by it"),
    Idle(
        "measure.timeout_s",
        lambda r: r.multirun and not r.config.sweep.isolate,
        "with sweep.isolate=false nothing can stop a cell",
    ),
    # tracking
    Idle(
        "tracking.project tracking.entity tracking.tags",
        lambda r: r.config.tracking.mode is TrackingMode.disabled,
        "tracking.mode=disabled makes no W&B run",
    ),
    # drawing tokens
    Idle("sampling", _attention, "workload.level=attention draws no tokens"),
    Idle("sampling", lambda r: _ragged(r) and not _attention(r), "this workload has no decode steps"),
    Idle(
        "sampling.top_k sampling.top_p sampling.min_p sampling.seed",
        lambda r: r.config.sampling.temperature == 0 and not _ragged(r) and not _attention(r),
        "sampling.temperature=0 takes the likeliest token",
    ),
    # decode steps
    Idle("cuda_graph", _ragged, "this workload has no decode steps"),
    Idle(
        "cuda_graph.batch_sizes",
        lambda r: r.config.cuda_graph.mode is GraphMode.off and not _ragged(r),
        "cuda_graph.mode=off captures nothing",
    ),
    Idle("kv.reserve_ahead", _ragged, "this workload has no decode steps"),
    # models
    Idle(_NOT_ATTENTION, _attention, "workload.level=attention runs the attention path alone"),
    Idle(
        "model.rope_scaling.factor model.rope_scaling.original_max_position model.rope_scaling.low_freq_factor "
        "model.rope_scaling.high_freq_factor model.rope_scaling.beta_fast model.rope_scaling.beta_slow "
        "model.rope_scaling.truncate model.rope_scaling.mscale model.rope_scaling.mscale_all_dim "
        "model.rope_scaling.attention_factor model.rope_scaling.short_factor model.rope_scaling.long_factor",
        lambda r: r.config.model.rope_scaling.type is RopeType.none,
        "model.rope_scaling.type=none scales no rotation",
    ),
    Idle(
        "model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor",
        _not_rope(RopeType.llama3),
        "only model.rope_scaling.type=llama3 reads it",
    ),
    Idle(
        "model.rope_scaling.beta_fast model.rope_scaling.beta_slow model.rope_scaling.truncate "
        "model.rope_scaling.mscale model.rope_scaling.mscale_all_dim",
        _not_rope(RopeType.yarn),
        "only model.rope_scaling.type=yarn reads it",
    ),
    Idle(
        "model.rope_scaling.attention_factor",
        _not_rope(RopeType.yarn, RopeType.longrope),
        "only model.rope_scaling.type=yarn and longrope read it",
    ),
    Idle(
        "model.rope_scaling.short_factor model.rope_scaling.long_factor",
        _not_rope(RopeType.longrope),
        "only model.rope_scaling.type=longrope reads it",
    ),
    Idle(
        "model.moe.experts_per_token model.moe.norm_topk_prob model.moe.bias",
        lambda r: r.config.model.moe.num_experts == 0,
        "model.moe.num_experts=0 has no experts",
    ),
    # workloads
    Idle(
        "workload.length_spread",
        lambda r: isinstance(r.config.workload, DecodeWorkload) and r.config.workload.batch_size == 1,
        "a batch of one request has one length, workload.context_len",
    ),
    Idle(
        "workload.prompt",
        _writes_no_text,
        "only written text follows it: workload.generate above 0, workload.level=model",
    ),
    Idle(
        "workload.prompt",
        lambda r: (
            isinstance(r.config.workload, GenerateWorkload) and r.config.workload.prompt_file is not None
        ),
        "the prompt is that of workload.prompt_file",
    ),
    Idle(
        "workload.retained_fraction",
        lambda r: isinstance(r.config.workload, TraceWorkload) and not r.config.workload.prefix_sharing,
        "workload.prefix_sharing=false retains nothing",
    ),
    # measurement
    Idle(
        "measure.check_requests measure.repeats measure.max_seconds measure.l2 measure.timer measure.self_test "
        "measure.ledger",
        _generates,
        "workload=generate takes the host's time while it writes one text",
    ),
    Idle(
        "measure.check_requests", lambda r: not r.config.measure.check, "measure.check=false checks nothing"
    ),
    Idle(
        "measure.quality",
        lambda r: (
            r.config.measure.quality and (not isinstance(r.config.workload, TextWorkload) or _attention(r))
        ),
        "only workload=text with workload.level=model has a quality",
    ),
    Idle(
        "measure.l2",
        lambda r: not r.on_gpu and r.config.measure.l2 is L2State.warm,
        "only a GPU's cache is flushed or kept warm",
    ),
    Idle("measure.self_test", lambda r: not r.on_gpu, "only a GPU's timer is tested"),
    Idle(
        "measure.warmup",
        lambda r: not r.on_gpu and r.config.measure.warmup > 1 and not _generates(r),
        "a CPU is warmed up by one call at most",
    ),
    # backends
    Idle(
        "backend.options.block_m backend.options.block_n backend.options.num_warps backend.options.num_stages",
        lambda r: not r.on_gpu and r.config.backend.name == "flex",
        "flex compiles no kernels on the CPU",
    ),
    Idle(
        "backend.options.kernel",
        lambda r: isinstance(r.config.workload, ExtendWorkload) and r.config.backend.name == "jax",
        "this workload has no decode steps",
    ),
    Idle(
        "backend.options.tensor_cores",
        lambda r: isinstance(r.config.workload, ExtendWorkload) and r.config.backend.name == "flashinfer",
        "it is for decode steps, and this workload has none",
    ),
    Idle(
        "backend.options.implementation",
        lambda r: isinstance(r.config.workload, DecodeWorkload) and r.config.backend.name == "flashinfer",
        "it is for extend passes, and this workload has none",
    ),
)


def no_effect(config: Config, given: Iterable[str], *, multirun: bool, on_gpu: bool) -> list[str]:
    """A note for each of the `given` keys that changes nothing, as in `measure.timeout_s: no effect here, ...`."""
    run = Run(config, multirun, on_gpu)
    idle = [(entry.keys.split(), entry.why) for entry in IDLE if entry.when(run)]
    notes: dict[str, str] = {}
    for key in given:
        for keys, why in idle:
            if any(key == name or key.startswith(f"{name}.") for name in keys):
                notes.setdefault(key, f"{key}: no effect here, {why}")
    return list(notes.values())


def given_keys(overrides: Sequence[str], preset: Path | None = None) -> list[str]:
    """The keys that were set: those of `overrides`, as in `+backend.options.gather=true`, and those in the file of a
    preset. Groups (`workload=decode`) are choices and no keys, but `hydra/launcher=` is one of hydra's keys."""
    typed = [text.lstrip("+~").partition("=")[0].replace("/", ".").partition("@")[0] for text in overrides]
    from_preset = list(_leaves(OmegaConf.to_container(OmegaConf.load(preset)))) if preset is not None else []
    return list(dict.fromkeys(key for key in [*typed, *from_preset] if "." in key))


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of plain data, without what is there for Hydra."""
    for key, value in node.items():
        if not prefix and key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
