"""One cell's check and one cell's times, as columns of its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fa_research.attention.layer import PagedAttention
from fa_research.config import GraphMode
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.engine import Engine
from fa_research.measure.ledger import ledger
from fa_research.measure.oracle import Oracle, check_attention, compare_logits, reprefill
from fa_research.measure.roofline import measure_roof
from fa_research.measure.timing import Timer, Timing
from fa_research.measure.work import attention_work
from fa_research.models import Decoder
from fa_research.workloads.base import Unit, Workload

_ABOVE_ROOF = 1.05  # the roof itself is measured, so a little above it is noise
Tick = Callable[[], None]


@dataclass(slots=True)
class Measurement:
    """Columns of the row, series for their own x-axes, and why the row is suspect (empty: it is not)."""

    metrics: dict[str, Any] = field(default_factory=dict)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)
    suspicions: list[str] = field(default_factory=list)


def check(engine: Engine, workload: Workload) -> tuple[bool, dict[str, Any]]:
    """Whether the workload's own result agrees with the oracle, and the errors as columns."""
    max_requests = engine.config.measure.check_requests
    passes, cases = workload.checked_passes()
    if engine.stack is not None:
        verdict = check_attention(engine, passes, max_requests)
        return verdict.passed, verdict.checks("attention")
    oracle = Oracle(engine, cases)
    verdict = oracle.judge([case.logits_MX for case in cases])
    passed, columns = verdict.passed, verdict.checks("logits")
    if workload.reprefill:
        again = reprefill(engine, cases)
        verdict = oracle.judge(again)
        passed = passed and verdict.passed
        columns |= verdict.checks("reprefill") | compare_logits(cases, again)
    return passed, columns


def measure(engine: Engine, workload: Workload, timer: Timer, tick: Tick) -> Measurement:
    """Time every unit of the workload, then, at `workload.level=attention`, the parts of the attention path. `tick` is
    called after each."""
    result = Measurement()
    for unit in workload.units():
        timing = timer.time(unit.run, unit.samples, reset=unit.reset)
        result.metrics |= timing.metrics(unit.name)
        result.metrics[f"{unit.name}_tokens_per_s"] = unit.tokens / timing.median_us * 1e6
        result.metrics["timing_method"], result.metrics["timing_l2"] = timing.method, timing.l2
        result.series[f"{unit.name}_us"] = timing.samples_us
        if unit.host_time and engine.device.type == "cuda":  # on the CPU the host does all of it
            host = timer.host_time(unit.run, unit.samples, reset=unit.reset)
            result.metrics[f"{unit.name}_host_us"] = host.median_us
        unit.reset()  # the pass that bytes and operations are counted of is the first timed one
        _roof(engine, workload, unit, timing, result)
        tick()
    if engine.stack is not None:
        _attention_parts(engine, engine.stack, workload, timer, result)
        tick()
    result.metrics |= _memory(engine)
    result.metrics |= workload.columns(result.metrics)
    # Last, as the profiler stays in the driver.
    for unit in workload.units() if engine.config.measure.ledger else []:
        result.metrics |= ledger(engine, unit, timer, result.metrics[f"{unit.name}_us"])
    return result


def _memory(engine: Engine) -> dict[str, Any]:
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

    parts: dict[str, Callable[[], object]] = {
        "metadata": lambda: backend.init_forward_metadata(batch, table),
        "kv_write": write,
        "attention": lambda: [attend.read(layer_id, q, stack.sinks_H) for layer_id in layers],
    }
    with torch.inference_mode():
        for name, run in parts.items():
            # What plans on the host, or depends on the host's lengths, is timed as it runs: without a graph.
            timing = timer.time(run, samples, graph=graph and name != "metadata")
            result.metrics |= timing.metrics(name)
    # The KV write's too; the metadata's is timing_method.
    result.metrics["attention_timing_method"] = timing.method
    work = attention_work(workload.current_pass(), engine.specs, engine.kv_dtype.itemsize)
    _rates(engine, "attention", work.bytes, work.flops, result.metrics["attention_us"], result)


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
    result.metrics |= {"roof_GB_per_s": roof.bytes_per_s / 1e9, "roof_TFLOP_per_s": roof.flops_per_s / 1e12}
    fraction = max(num_bytes / roof.bytes_per_s, flops / roof.flops_per_s) / microseconds * 1e6
    result.metrics[f"{name}_roof_fraction"] = fraction
    if fraction > _ABOVE_ROOF and result.metrics["timing_l2"] == "cold":
        result.suspicions.append(f"{name} reached {fraction:.2f} of the measured roof, which cannot be")
