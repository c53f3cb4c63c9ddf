"""Small cells of every workload, and their parts put together as the runner does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fa_research.config import (
    BackendConfig,
    Config,
    CudaGraphConfig,
    DebugConfig,
    DecodeWorkload,
    Device,
    ExtendWorkload,
    GraphMode,
    KVConfig,
    Level,
    MeasureConfig,
    MixedWorkload,
    ModelConfig,
    TextWorkload,
    TrackingConfig,
    TrackingMode,
    WorkloadConfig,
    validate,
)
from fa_research.engine.engine import Engine
from fa_research.runner import build_cell as build
from fa_research.workloads import Workload

# Lengths that no page size divides.
WORKLOADS: dict[str, WorkloadConfig] = {
    "decode": DecodeWorkload(batch_size=3, context_len=21, steps=4, length_spread=0.5),
    "extend": ExtendWorkload(batch_size=3, new_len=9, prefix_len=5),
    "extend-chunks": ExtendWorkload(batch_size=3, new_len=17, prefix_len=5, chunk_size=7),
    "extend-cold": ExtendWorkload(batch_size=2, new_len=19),
    "mixed": MixedWorkload(
        extend_requests=2, new_len=9, prefix_len=3, decode_requests=3, context_len=21
    ),
    "text": TextWorkload(batch_size=3, prompt_len=43, shared_prefix_len=35, chunk_size=7, steps=5),
    "text-unshared": TextWorkload(batch_size=2, prompt_len=11, shared_prefix_len=0, chunk_size=20, steps=1),
}  # fmt: skip
LEVELS = tuple(Level)


def model_config(**changes: Any) -> ModelConfig:
    small = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
        "intermediate_size": 48, "vocab_size": 256, "max_context_len": 128,
    }  # fmt: skip
    return ModelConfig(**small | changes)


def cell(
    workload: str | WorkloadConfig = "decode",
    level: Level = Level.model,
    *,
    page_size: int = 16,
    device: str = "cpu",
    backend: str = "torch",
    poison: bool = True,
    **changes: Any,
) -> Config:
    """A valid config of a small cell in which every invariant is checked."""
    options = WORKLOADS[workload] if isinstance(workload, str) else workload
    fields = {name: getattr(options, name) for name in type(options).__dataclass_fields__}
    config = Config(
        device=Device(device),
        backend=BackendConfig(backend),
        model=model_config(),
        kv=KVConfig(page_size),
        cuda_graph=CudaGraphConfig(GraphMode.auto, [1, 2, 4, 8]),
        workload=type(options)(**fields | {"level": level}),
        # On a busy machine a ledger may have to say that it does not add up, and the self-test of timing that a known
        # time is off: their own tests turn them on.
        measure=MeasureConfig(warmup=1, repeats=2, max_seconds=5.0, ledger=False, self_test=False),
        tracking=TrackingConfig(mode=TrackingMode.disabled, progress=False),
        debug=DebugConfig(check_invariants=True, poison=poison),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    validate(config)
    return config


def prepared(config: Config) -> tuple[Workload, Engine]:
    workload, engine = build(config)
    workload.prepare(engine)
    return workload, engine


def text_file(folder: Path, length: int = 4000) -> Path:
    """A text in which every passage is another."""
    words = (f"{number} is followed by {number + 1}; " for number in range(length))
    path = folder / "text.txt"
    path.write_text("".join(words)[:length])
    return path
