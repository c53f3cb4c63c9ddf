"""The shared runner: one typed config in, one row out. Correct first, then timed, then tracked."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fa_research import workloads
from fa_research.config import Config, Level, config_hash
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.engine import Engine, build_engine, resolve_device
from fa_research.engine.model_runner import EngineModel
from fa_research.measure.cell import Measurement, check, measure
from fa_research.measure.quality import measure_quality
from fa_research.measure.timing import Timer
from fa_research.models import attention_specs, build_model
from fa_research.tracking import (
    ROWS_FILE,
    Row,
    RowWriter,
    Status,
    environment,
    print_table,
    progress,
    stream_text,
    wandb_run,
)
from fa_research.tracking.records import now
from fa_research.tracking.wandb_mirror import WandbMirror
from fa_research.workloads.text import Text

log = logging.getLogger(__name__)


def run_cell(config: Config, *, resolved: dict[str, Any], output_dir: Path, multirun: bool) -> Row:
    """Run one cell and return its row, which is on disk in `output_dir` by then.

    Raises FaResearchError for what the user asked wrongly and whatever a broken cell raises; the caller turns both into
    rows. `resolved` is the config as plain data, for the row and for W&B.
    """
    digest = config_hash(config)
    row = Row(Status.ok, config=resolved, config_hash=digest)
    torch.manual_seed(config.seed)
    with (
        RowWriter(output_dir / ROWS_FILE) as writer,
        wandb_run(
            config, resolved=resolved, output_dir=output_dir, multirun=multirun, config_hash=digest
        ) as mirror,
    ):
        _fill(row, config, mirror)
        row.finished = now()
        mirror.log_row(row)
        writer.write(row)
    if not multirun:
        print_table([row])
        log.info("row, config and log are in %s", output_dir)
    return row


def _fill(row: Row, config: Config, mirror: WandbMirror) -> None:
    """Build, write text, check, score, time."""
    workload = workloads.create(config)
    needs = workload.needs()
    specs = attention_specs(config.model)
    if config.workload.level is Level.attention and config.workload.num_layers is not None:
        specs = specs[: config.workload.num_layers]
    device = resolve_device(config)

    def make_model(device: torch.device, dtype: torch.dtype) -> EngineModel:
        if config.workload.level is Level.attention:
            tokens = max([needs.tokens_per_pass, *config.cuda_graph.batch_sizes])
            return AttentionStack(specs, max_tokens=tokens, dtype=dtype, device=device, seed=config.seed)
        shown = partial(progress, enabled=config.tracking.progress)
        return build_model(
            config.model, dtype=dtype, device=device, seed=config.seed, rope_len=needs.rope_len, progress=shown
        )  # fmt: skip

    engine = build_engine(config, needs, specs, device, make_model)  # loading draws its own progress
    row.environment = environment() | _environment(engine)
    if isinstance(workload, Text) and workload.writes:
        row.generated = _generate(engine, workload)
    with progress(f"{config.backend.name} {config.workload.name}", 4, config.tracking.progress) as tick:
        workload.prepare(engine)
        row.environment |= _environment(engine)  # whether decode steps are captured is known now
        tick()
        if config.measure.check:
            passed, row.checks = check(engine, workload)
            if not passed:
                row.status = Status.inaccurate
                row.reasons.append(
                    f"differs from the float64 oracle by more than the tolerance: {_worst(row.checks)}"
                )
        else:
            row.notes.append("not checked against the oracle: measure.check=false")
        if config.measure.quality and isinstance(workload, Text) and engine.stack is None:
            row.metrics |= measure_quality(engine, workload)
        tick()
        if row.status is Status.ok:
            _time(row, engine, workload, config, mirror, tick)
    row.notes += engine.notes


def _generate(engine: Engine, workload: Text) -> dict[str, str]:
    """The text that `workload.generate` asks for, streamed to the screen."""
    prompt, text = stream_text(workload.generation(engine).text())
    return {"prompt": prompt, "text": text}


def _time(
    row: Row, engine: Engine, workload: workloads.Workload, config: Config, mirror: WandbMirror, tick: Any
) -> None:
    options = config.measure
    timer = Timer(engine.device, warmup=options.warmup, max_seconds=options.max_seconds, l2=options.l2)
    result: Measurement = measure(engine, workload, timer, tick)
    row.metrics |= result.metrics
    for name, values in result.series.items():
        mirror.log_series(f"series/{name}", "series/sample", values)
    if result.suspicions:
        row.status = Status.suspect
        row.reasons += result.suspicions


def _environment(engine: Engine) -> dict[str, Any]:
    """What ran, as opposed to what was asked for."""
    lowering = dict.fromkeys(engine.backend.lowerings)
    return {
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "kv_dtype": str(engine.kv_dtype).removeprefix("torch."),
        "backend": engine.backend.name,
        "backend_provider": engine.backend.provider,
        "lowering": [{"kind": low.kind.value, "rewrites": list(low.rewrites)} for low in lowering],
        "cuda_graph_mode": (engine.decode_mode or engine.graph_mode).value,
        "triton_interpreter": engine.backend.name == "triton" and engine.device.type == "cpu",
    }


def _worst(checks: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:.3g}" for name, value in checks.items() if isinstance(value, float))
