"""One cell's check and one cell's times, as columns of its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fa_research.attention.layer import PagedAttention
from fa_research.backends import AttentionBackend
from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.config import GraphMode
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.engine import Engine
from fa_research.measure import nvml
from fa_research.measure.against import time_against
from fa_research.measure.first_layer import first_layer_off
from fa_research.measure.ledger import ledger
from fa_research.measure.numerics import Verdict
from fa_research.measure.nvml import open_monitor
from fa_research.measure.oracle import Oracle, check_attention, compare_logits, reprefill
from fa_research.measure.roofline import measure_roof, measure_roof_again
from fa_research.measure.self_test import cannot, self_test
from fa_research.measure.timing import Timer, Timing
from fa_research.measure.work import attention_work
from fa_research.models import Decoder
from fa_research.workloads.base import Unit, Workload

_ABOVE_ROOF = 1.05  # the roof itself is measured, so a little above it is noise
Stage = Callable[[str], object]  # told what begins now


@dataclass(slots=True)
class Measurement:
    """Columns of the row, every sample of those that are medians (microseconds), series for their own x-axes, why the
    row is suspect (empty: it is not), and what its reader should know."""

    metrics: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)
    suspicions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, timing: Timing) -> None:
        """The columns and samples of one thing timed."""
        self.metrics |= timing.metrics(name)
        self.keep(f"{name}_us", timing.samples_us)

    def keep(self, metric: str, samples: Iterable[float]) -> None:
        """The samples, in microseconds, that `metric` is the median of; nanoseconds are the last digit kept."""
        self.samples[metric] = [round(sample, 3) for sample in samples]


def check(engine: Engine, workload: Workload) -> tuple[bool, dict[str, Any]]:
    """Whether the workload's own result agrees with the oracle, and the errors as columns."""
    max_requests = engine.config.measure.check_requests
    passes, cases = workload.checked_passes()
    if engine.stack is not None:
        verdict, where = check_attention(engine, passes, max_requests)
        return verdict.passed, verdict.checks("attention") | _failure("attention", verdict, where)
    oracle = Oracle(engine, cases)
    passed, columns = _judged(engine, oracle, "logits", [case.logits_MX for case in cases])
    if workload.reprefill:
        again = reprefill(engine, cases)
        passed_again, more = _judged(engine, oracle, "reprefill", again)
        passed = passed and passed_again
        columns |= more | compare_logits(cases, again)
    return passed, columns


def _judged(engine: Engine, oracle: Oracle, name: str, results: list[Tensor]) -> tuple[bool, dict[str, Any]]:
    verdict, where = oracle.judge(results), ""
    if not verdict.passed:
        where = oracle.where(results, verdict)
        if math.isfinite(verdict.baseline_error):  # else the result is not what is wrong
            where += f"; {first_layer_off(engine, oracle.worst_case(results))}"
    return verdict.passed, verdict.checks(name) | _failure(name, verdict, where)


def _failure(name: str, verdict: Verdict, where: str) -> dict[str, str]:
    """Columns of a verdict that failed alone: which side is not finite, and where the result is off."""
    said = {f"{name}_fault": verdict.fault, f"{name}_where": where}
    return {column: text for column, text in said.items() if text}


def cell_timer(engine: Engine) -> tuple[Timer, list[str]]:
    """The timer that `measure` asks for, and notes for the row."""
    options = engine.config.measure
    monitor, notes = open_monitor(engine.device)
    timer = Timer(
        engine.device,
        warmup=options.warmup,
        max_seconds=options.max_seconds,
        l2=options.l2,
        kind=options.timer,
        monitor=monitor,
    )
    if timer.on_gpu and engine.backend.capabilities.host_planning:
        notes.append(
            f"backend={engine.backend.name} plans while the GPU still runs the sample before or flushes L2: a unit's "
            "time holds what of the planning outlasts that; its host_us is the host's own time"
        )
    return timer, notes


def measure(
    engine: Engine, workload: Workload, timer: Timer, stage: Stage, other: Workload | None = None
) -> Measurement:
    """Time every unit of the workload, at `workload.level=attention` the parts of the attention path too, then in turns
    with `other`, the workload of `measure.against`, and last what each part of a unit costs. `stage` is told what
    begins. Raises TimingError where the self-test fails."""
    result = Measurement()
    if engine.device.type == "cuda" and engine.config.measure.self_test:
        result.metrics |= self_test(engine.device, timer.kind)
        if reason := cannot():
            result.notes.append(f"the timer was not tested: {reason}")
    for unit in workload.units():
        stage(f"timing {unit.name}")
        _measure_unit(engine, workload, unit, timer, result)
    if engine.stack is not None:
        stage("timing the parts of attention")
        _attention_parts(engine, engine.stack, workload, timer, result)
    result.metrics |= memory_columns(engine)
    result.metrics |= workload.columns(result.metrics)
    if timer.monitor is not None:
        result.metrics |= nvml.columns(timer.monitor.series)
        result.suspicions += nvml.suspicions(timer.monitor.series)
    if other is not None:
        stage("timing against the other engine")
        _compare(result, workload, other, timer)
    # Last: traced runs are no timed ones, and what is timed above is over by now.
    for unit in workload.units() if engine.config.measure.ledger else []:
        stage(f"breaking {unit.name} down into its parts")
        timed_us = result.metrics.get(f"{unit.name}_span_us", result.metrics[f"{unit.name}_us"])
        result.metrics |= ledger(engine, unit, timer, timed_us)
    return result


def _measure_unit(engine: Engine, workload: Workload, unit: Unit, timer: Timer, result: Measurement) -> None:
    """The unit's times, the host's own among them, and what they come to beside the roof."""
    timing = timer.time(unit.run, unit.samples, reset=unit.reset)
    result.add(unit.name, timing)
    counts = {"": unit.tokens}
    if unit.prompt_tokens is not None:
        counts = {"computed_": unit.tokens, "prompt_": unit.prompt_tokens}
    for kind, tokens in counts.items():
        result.metrics[f"{unit.name}_{kind}tokens_per_s"] = tokens / timing.median_us * 1e6
    result.metrics["timing_method"], result.metrics["timing_l2"] = timing.method, timing.l2
    result.series[f"{unit.name}_us"] = timing.samples_us
    if unit.host_time and engine.device.type == "cuda":  # on the CPU the host does all of it
        host = timer.host_time(unit.run, unit.samples, reset=unit.reset)
        result.metrics[f"{unit.name}_host_us"] = host.median_us
        result.keep(f"{unit.name}_host_us", host.samples_us)
    unit.reset()  # the pass that bytes and operations are counted of is the first timed one
    _roof(engine, workload, unit, timing, result)


def _compare(result: Measurement, workload: Workload, other: Workload, timer: Timer) -> None:
    """Add what `measure.against` found, the units of both timed in turns."""
    columns, samples, notes = time_against(workload, other, timer, workload.config.measure.against)
    result.metrics |= columns
    for metric, taken in samples.items():
        result.keep(metric, taken)
    result.notes += notes


def memory_columns(engine: Engine) -> dict[str, Any]:
    """What the engine holds: the KV pool, and the weights of a model."""
    cache = engine.cache
    weights = (
        sum(p.nbytes for p in engine.runner.model.parameters())
        if isinstance(engine.runner.model, nn.Module)
        else 0
    )
    return {
        "kv_pool_bytes": cache.kv.num_bytes,
        "kv_num_pages": cache.allocator.num_pages,
        "model_weight_bytes": weights,
    }


def _attention_parts(
    engine: Engine, stack: AttentionStack, workload: Workload, timer: Timer, result: Measurement
) -> None:
    """Metadata, KV write and attention of the same pass, each alone and over all layers."""
    backend, batch = engine.backend, workload.batch()
    graph = engine.graph_mode is GraphMode.on
    samples = engine.config.measure.repeats
    table, layers = engine.runner.req_to_token_RW, range(len(engine.specs))
    q, k, v = (tensor[: batch.num_tokens] for tensor in (stack.q_THD, stack.k_TKD, stack.v_TKV))
    attend = PagedAttention(backend, engine.cache.kv, batch, backend.lowerings)

    def write() -> None:
        for layer_id in layers:
            attend.write(layer_id, q, k, v, None)

    def read() -> None:
        for layer_id in layers:
            attend.read(layer_id, q, stack.sinks_H)

    with torch.inference_mode():
        make_metadata, in_graph = _metadata(backend, batch, table, graph)
        _part("metadata", timer.time(make_metadata, samples, graph=in_graph), result)
        backend.init_forward_metadata(batch, table)  # what a graph planned went with the graph
        _part("kv_write", timer.time(write, samples, graph=graph), result)
        _part("attention", timer.time(read, samples, graph=graph), result)
    work = attention_work(workload.current_pass(), engine.specs, engine.kv_dtype.itemsize)
    _rates(engine, "attention", work.bytes, work.flops, result.metrics["attention_us"], result)


def _metadata(
    backend: AttentionBackend, batch: ForwardBatch, table: Tensor, graph: bool
) -> tuple[Callable[[], object], bool]:
    """What makes the metadata of the pass, and whether a graph can hold it: as in captured steps, not where the host
    plans or copies lengths to the device."""
    if not graph or batch.mode is not ForwardMode.DECODE or backend.capabilities.host_planning:
        return lambda: backend.init_forward_metadata(batch, table), False
    state = backend.init_cuda_graph_state(batch.batch_size, batch.max_seq_len_k)
    return lambda: backend.init_forward_metadata_capture_cuda_graph(batch, table, state), True


def _part(name: str, timing: Timing, result: Measurement) -> None:
    result.add(name, timing)
    result.metrics[f"{name}_timing_method"] = timing.method


def _roof(engine: Engine, workload: Workload, unit: Unit, timing: Timing, result: Measurement) -> None:
    """The share of the roof that a model's unit reached: weights and cache read once, or its multiply-adds."""
    model = engine.runner.model
    if not isinstance(model, Decoder) or unit.name == "prefill":
        return
    done = workload.current_pass()
    work = attention_work(done, engine.specs, engine.kv_dtype.itemsize)
    flops = 2 * model.multiply_adds(unit.tokens, len(done.rows)) + work.flops
    num_bytes = model.step_weight_bytes(unit.tokens, len(done.rows)) + work.bytes
    _rates(engine, unit.name, num_bytes, flops, timing.median_us, result)


def _rates(
    engine: Engine, name: str, num_bytes: int, flops: int, microseconds: float, result: Measurement
) -> None:
    """What moving these bytes and doing these operations in that time comes to, and its share of the roof."""
    result.metrics[f"{name}_GB_per_s"] = num_bytes / microseconds / 1e3
    result.metrics[f"{name}_TFLOP_per_s"] = flops / microseconds / 1e6
    if engine.device.type != "cuda":
        return
    roof = measure_roof(engine.device, engine.dtype)
    fraction = roof.fraction(num_bytes, flops, microseconds)
    if roof.cached and fraction > _ABOVE_ROOF:  # it may have been measured on a bad day
        roof = measure_roof_again(engine.device, engine.dtype)
        fraction = roof.fraction(num_bytes, flops, microseconds)
    result.metrics |= {"roof_GB_per_s": roof.bytes_per_s / 1e9, "roof_TFLOP_per_s": roof.flops_per_s / 1e12}
    result.metrics["roof_copy_GB_per_s"] = roof.copy_bytes_per_s / 1e9
    result.metrics["roof_read_GB_per_s"] = roof.read_bytes_per_s / 1e9
    result.metrics["roof_from"] = f"cached {roof.measured}" if roof.cached else "measured"
    result.metrics[f"{name}_roof_fraction"] = fraction
    if not fraction <= _ABOVE_ROOF and result.metrics["timing_l2"] == "cold":
        result.suspicions.append(f"{name} reached {fraction:.2f} of the measured roof, which cannot be")
