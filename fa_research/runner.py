"""The shared runner: one typed config in, one row out. Correct first, then timed, then tracked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fa_research import plugins, workloads
from fa_research.config import Config, Level, config_hash
from fa_research.config.no_effect import no_effect
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.engine import Engine, build_engine, create_backend, resolve_device, resolve_dtype
from fa_research.engine.fits import check_fits
from fa_research.engine.model_runner import EngineModel
from fa_research.errors import DoesNotFit, Refusal
from fa_research.fingerprint import fingerprint
from fa_research.measure.cell import Stage, cell_timer, check, measure
from fa_research.measure.cupti import check_timer
from fa_research.measure.generation import measure_generation
from fa_research.measure.quality import measure_quality, not_finite
from fa_research.models import attention_specs, build_model
from fa_research.tracking import (
    ROWS_FILE,
    Row,
    RowWriter,
    Status,
    environment,
    print_table,
    progress,
    stages,
    stream_text,
    wandb_run,
)
from fa_research.tracking.records import now
from fa_research.tracking.wandb_mirror import WandbMirror
from fa_research.workloads.generate import Generate
from fa_research.workloads.generation import Generation
from fa_research.workloads.text import Text

log = logging.getLogger(__name__)

Stages = Callable[[], AbstractContextManager[Stage]]  # opens a place on the screen for what is under way


def run_cell(
    config: Config,
    *,
    resolved: dict[str, Any],
    output_dir: Path,
    multirun: bool,
    against: Config | None = None,
    given: Sequence[str] = (),
) -> Row:
    """Run one cell and return its row, which is on disk in `output_dir` by then.

    Raises FaResearchError for what the user asked wrongly and whatever a broken cell raises; the caller turns both into
    rows. `resolved` is the config as plain data, for the row and for W&B; `against` the config of `measure.against`;
    `given` the keys that the user set: the row's notes name those without an effect.
    """
    digest = config_hash(config)
    row = Row(Status.ok, config=resolved, config_hash=digest)
    on_gpu = resolve_device(config).type == "cuda"
    row.notes += no_effect(config, given, multirun=multirun, on_gpu=on_gpu)
    torch.manual_seed(config.seed)
    with (
        RowWriter(output_dir / ROWS_FILE) as writer,
        wandb_run(
            config, resolved=resolved, output_dir=output_dir, multirun=multirun, config_hash=digest
        ) as mirror,
    ):
        shown = partial(stages, enabled=config.tracking.progress, quiet=multirun)
        _fill(row, config, against, mirror, shown)
        row.finished = now()
        mirror.log_row(row)
        writer.write(row)
    if not multirun:
        print_table([row])
        log.info("row, config and log are in %s", output_dir)
    return row


def _fill(row: Row, config: Config, against: Config | None, mirror: WandbMirror, shown: Stages) -> None:
    """Build, write text, check, score, time."""
    plugins.check()
    check_timer(config.measure.timer, resolve_device(config))
    with shown() as stage:
        stage(f"loading {config.model.name}")
        workload, engine = build_cell(config)
    row.environment = environment(_classes(workload, engine)) | _environment(engine)
    if isinstance(workload, Text) and workload.writes:
        row.generated = _written(workload.generation(engine))
    with shown() as stage:
        stage(f"preparing {config.workload.name} on {engine.backend.name}")
        workload.prepare(engine)
        row.environment |= _environment(engine)  # whether decode steps are captured is known now
    if isinstance(workload, Generate):
        row.generated = _written(workload.generation)
    with shown() as stage:
        if config.measure.check:
            stage("checking against float64")
        _check(row, engine, workload)
        if config.measure.quality and isinstance(workload, Text) and engine.stack is None:
            stage("scoring the text")
            quality = measure_quality(engine, workload)
            row.metrics |= quality
            if reason := not_finite(quality):
                row.status = Status.inaccurate
                row.reasons.append(reason)
        other = None
        if against is not None:
            stage("building and checking the other engine")
            other = _second(row, config, against)
        if row.status is Status.ok:
            _time(row, engine, workload, other, mirror, stage)
    row.notes += engine.notes


def build_cell(config: Config) -> tuple[workloads.Workload, Engine]:
    """The workload of a config and the engine that it needs, not prepared yet. Raises DoesNotFit where it cannot fit,
    but Refusal where the backend could not run it either."""
    specs = attention_specs(config.model)
    if config.workload.level is Level.attention and config.workload.num_layers is not None:
        specs = specs[: config.workload.num_layers]
    device = resolve_device(config)
    try:
        check_fits(config, device)
    except DoesNotFit:
        create_backend(config, specs, device, resolve_dtype(config.model.dtype, device), [])
        raise
    workload = workloads.create(config)
    needs = workload.needs()

    def make_model(device: torch.device, dtype: torch.dtype) -> EngineModel:
        if config.workload.level is Level.attention:
            tokens = max([needs.tokens_per_pass, *config.cuda_graph.batch_sizes])
            return AttentionStack(specs, max_tokens=tokens, dtype=dtype, device=device, seed=config.seed)
        shown = partial(progress, enabled=config.tracking.progress)
        return build_model(
            config.model, dtype=dtype, device=device, seed=config.seed, rope_len=needs.rope_len, progress=shown
        )  # fmt: skip

    return workload, build_engine(config, needs, specs, device, make_model)


def _check(row: Row, engine: Engine, workload: workloads.Workload, which: str = "") -> None:
    """The oracle's verdict in the row; `which` engine it is, where it is not the row's own."""
    if not engine.config.measure.check:
        row.notes.append(f"{which}not checked against the oracle: measure.check=false")
        return
    passed, checks = check(engine, workload)
    row.checks |= {f"against_{name}" if which else name: value for name, value in checks.items()}
    if not passed:
        row.status = Status.inaccurate
        row.reasons.append(f"{which}{_why_inaccurate(checks)}")


def _second(row: Row, config: Config, against: Config) -> workloads.Workload:
    """The workload of `measure.against` over an engine of its own, checked and ready to be timed."""
    workload, engine = _second_engine(config, against)
    about = {"backend", "backend_provider", "lowering", "cuda_graph_mode", "dtype", "kv_dtype"}
    row.environment["against"] = {k: v for k, v in _environment(engine).items() if k in about}
    if more := fingerprint(_classes(workload, engine)).get("plugins"):
        row.environment["code"].setdefault("plugins", {}).update(more)
    _check(row, engine, workload, f"measure.against={list(config.measure.against)}: ")
    row.notes += [f"against: {note}" for note in engine.notes]
    return workload


def _second_engine(config: Config, against: Config) -> tuple[workloads.Workload, Engine]:
    try:
        workload, engine = build_cell(against)
        workload.prepare(engine)
    except Refusal as error:
        reasons = [f"measure.against: {reason}" for reason in error.reasons]
        raise type(error)(error.name, reasons, error.alternatives) from error
    except (torch.OutOfMemoryError, MemoryError, DoesNotFit) as error:
        raise MemoryError(
            f"measure.against={list(config.measure.against)} builds a second engine beside the first, and both have "
            f"to fit: {error}"
        ) from error
    return workload, engine


def _written(generation: Generation) -> dict[str, str]:
    """The text that `workload.generate` asks for, streamed to the screen."""
    prompt, text = stream_text(generation.text())
    return {"prompt": prompt, "text": text}


def _time(
    row: Row,
    engine: Engine,
    workload: workloads.Workload,
    other: workloads.Workload | None,
    mirror: WandbMirror,
    stage: Stage,
) -> None:
    if isinstance(workload, Generate):
        result = measure_generation(engine, workload.generation)
    else:
        timer, notes = cell_timer(engine)
        row.notes += notes
        result = measure(engine, workload, timer, stage, other)
    row.metrics |= result.metrics
    row.samples |= result.samples
    row.notes += result.notes
    for name, values in result.series.items():
        mirror.log_series(f"series/{name}", "series/sample", values)
    if result.suspicions:
        row.status = Status.suspect
        row.reasons += result.suspicions


def _classes(workload: workloads.Workload, engine: Engine) -> list[type]:
    """Whose code decides what the cell measures, besides this package."""
    masks = {type(spec.mask) for spec in attention_specs(engine.config.model)}
    return [type(workload), type(engine.backend), *masks]


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


def _why_inaccurate(checks: dict[str, Any]) -> str:
    """Why the check failed, and where."""
    faults = dict.fromkeys(text for name, text in checks.items() if name.endswith("_fault"))
    places = dict.fromkeys(text for name, text in checks.items() if name.endswith("_where"))
    why = "differs from the float64 oracle by more than the tolerance"
    if faults:
        why = f"failed against the float64 oracle: {'; '.join(faults)}"
    return "; ".join([f"{why}: {_worst(checks)}", *places])


def _worst(checks: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:.3g}" for name, value in checks.items() if isinstance(value, float))
