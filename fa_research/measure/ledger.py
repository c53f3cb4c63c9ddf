"""The step-cost ledger: what each part of a unit costs, in columns that have to add up to the timed unit.

On a GPU the unit is launched once kernel by kernel with its phases marked, a delimiter at each border: that tells the
phase of each kernel. Then it runs as it was timed (a graph's replay, say) under the profiler, and its kernels are told
by name and order. A part is the device's time in its kernels, overlap counted once; the gap is the time in which the
device ran nothing. On the CPU a clock is read at the marks.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fa_research import phases
from fa_research.config import GraphMode
from fa_research.engine.engine import Engine
from fa_research.measure.device_trace import (
    Kernel,
    Segment,
    TraceCost,
    TraceError,
    delimit,
    segments,
    trace,
    trace_cost,
)
from fa_research.measure.timing import Timer
from fa_research.workloads.base import Unit

COMBINE, GAP = "combine", "gap"
PARTS = (
    phases.HOST_PLAN, phases.METADATA, phases.KV_WRITE, phases.ATTENTION, COMBINE, phases.MODEL, phases.SAMPLING, GAP,
)  # fmt: skip
# Of the timed unit, by the type of the device: runs on a CPU differ from each other by what else it does.
TOLERANCE = {"cuda": 0.05, "cpu": 0.5}
_MOST, _LEAST = 12, 3  # times a unit runs for its ledger
_SECONDS = 0.25  # of the unit's own time, roughly

Costs = dict[str, float]  # part -> microseconds


@dataclass(frozen=True, slots=True)
class Label:
    """What a kernel is for. `planned`: it is the first that the device could start after the host had planned."""

    phase: str
    planned: bool = False


def ledger(engine: Engine, unit: Unit, timer: Timer, timed_us: float) -> dict[str, float]:
    """Columns of one unit whose timed median is `timed_us`. What a reader has to know goes to the engine's notes: that
    the parts do not add up, or why there is no ledger."""
    count = min(unit.samples, max(_LEAST, min(_MOST, int(_SECONDS * 1e6 / timed_us))))
    try:
        if engine.device.type == "cuda":
            costs, columns = _on_device(engine, unit, timer, count)
        else:
            costs, columns = clocked(unit, count), {}
    except TraceError as error:
        engine.notes.append(f"no ledger of {unit.name}: {error}")
        return {}
    fraction = sum(costs.values()) / timed_us
    tolerance = TOLERANCE[engine.device.type]
    if abs(fraction - 1) > tolerance:
        engine.notes.append(
            f"the ledger of {unit.name} adds up to {fraction:.2f} of the timed {timed_us:,.0f} us, not to "
            f"{1 - tolerance:.2f} .. {1 + tolerance:.2f}"
        )
    columns = {f"{unit.name}_{name}": value for name, value in columns.items()}
    columns |= {f"{unit.name}_ledger_{part}_us": costs[part] for part in PARTS if part in costs}
    return columns | {f"{unit.name}_ledger_sum_fraction": fraction}


def clocked(unit: Unit, count: int) -> Costs:
    """Medians of the host's time in each phase over `count` runs; the gap is what lies in no phase. Where results are
    joined is not to be seen from outside, so that there is no `combine`."""
    runs: list[Costs] = []
    unit.reset()
    deadline = time.monotonic() + 2 * _SECONDS
    while len(runs) < count and (not runs or time.monotonic() < deadline):
        borders: list[tuple[int, str | None]] = [(time.perf_counter_ns(), None)]
        with phases.listening(lambda phase: borders.append((time.perf_counter_ns(), phase))):  # noqa: B023
            unit.run()
        borders.append((time.perf_counter_ns(), None))
        costs: Costs = dict.fromkeys((part for part in PARTS if part != COMBINE), 0.0)
        for (begin, phase), (end, _) in zip(borders, borders[1:], strict=False):
            costs[phase or GAP] += (end - begin) / 1e3
        runs.append(costs)
    unit.reset()
    return medians(runs)


def medians(runs: Sequence[Costs]) -> Costs:
    """Of each part."""
    return {part: median(run[part] for run in runs) for part in runs[0]}


def _on_device(engine: Engine, unit: Unit, timer: Timer, count: int) -> tuple[Costs, dict[str, float]]:
    cost = trace_cost(engine.device)
    launch = unit.launch or unit.run
    unit.reset()
    launch()  # warm-up: keeps one-time work out
    marks: list[str | None] = []

    def border(phase: str | None) -> None:
        delimit()
        marks.append(phase)

    def run() -> None:
        unit.reset()
        border(None)
        with phases.listening(border):
            launch()
        border(None)
        unit.reset()
        for _ in range(count):
            timer.prepare_l2()
            delimit()
            unit.run()
            delimit()

    found = trace(run)
    if not {phases.METADATA, phases.ATTENTION} <= set(marks):
        raise TraceError(f"launching {unit.name} passed no marks of metadata and attention")
    unit.reset()
    pieces = segments(found, len(marks) + 2 * count)
    # Behind the last mark, and between steps, there is what puts the unit back and flushes the L2.
    labelled = list(labels(zip(marks[:-1], pieces, strict=False)))
    graph = unit.launch is not None and engine.decode_mode is GraphMode.on
    combine = engine.backend.combine_kernels
    runs = [
        account(step, assign(step.kernels, labelled), combine, Idle(cost, graph=graph))
        for step in pieces[len(marks) :: 2]
    ]
    columns = {"ledger_kernels": float(len(labelled)), "ledger_trace_kernel_us": cost.kernel_us}
    if engine.backend.capabilities.host_planning:
        columns["host_plan_us"] = clocked(unit, count)[phases.HOST_PLAN]
    return medians(runs), columns


def labels(marked: Iterable[tuple[str | None, Segment]]) -> Iterable[tuple[str, Label]]:
    """(name, label) of each kernel of a marked pass, from its segments and the phases they lie in; what lies in no
    phase counts as the model's."""
    planned = False
    for phase, segment in marked:
        planned = planned or phase == phases.HOST_PLAN
        for kernel in segment.kernels:
            yield kernel.name, Label(phase or phases.MODEL, planned)
            planned = phase == phases.HOST_PLAN


def assign(kernels: Sequence[Kernel], labelled: Sequence[tuple[str, Label]]) -> list[Label]:
    """The labels of a step's kernels: those of the marked pass if both ran the same kernels, the nth of a name having
    the label of the nth; else by name alone, where each name has one phase. Raises TraceError where that leaves it
    open."""
    by_name: dict[str, deque[Label]] = defaultdict(deque)
    for name, label in labelled:
        by_name[name].append(label)
    if Counter(kernel.name for kernel in kernels) == Counter(name for name, _ in labelled):
        return [by_name[kernel.name].popleft() for kernel in kernels]
    for kernel in kernels:
        several = {label.phase for label in by_name.get(kernel.name, ())}
        if len(several) != 1 or any(label.planned for label in by_name[kernel.name]):
            raise TraceError(
                f"the step ran {len(kernels)} kernels and the marked pass {len(labelled)}, and {kernel.name} is of "
                f"{' and '.join(sorted(several)) or 'no phase that was marked'}"
            )
    return [by_name[kernel.name][0] for kernel in kernels]


class Idle:
    """Idle time before a kernel without what tracing adds to it.

    In a graph that is the same for each kernel. Outside one the traced host launches later and later than it would; the
    device waits for that wherever it waits for the host, and not where it has work queued."""

    def __init__(self, cost: TraceCost, *, graph: bool) -> None:
        self._cost = cost
        self._graph = graph
        self._late_us = 0.0

    def __call__(self, idle_us: float) -> float:
        """Of the next kernel, in the order of their starts."""
        idle_us = max(0.0, idle_us - self._cost.kernel_us)
        if self._graph:
            return idle_us
        self._late_us += self._cost.launch_us
        waits_us = max(0.0, idle_us - self._cost.idle_us)
        taken_us = min(waits_us, self._late_us)
        self._late_us = self._late_us - taken_us if waits_us else 0.0
        return idle_us - taken_us


def account(
    step: Segment, labels: Sequence[Label], combine_kernels: Sequence[str], idle: Callable[[float], float]
) -> Costs:
    """Each part's microseconds of one traced step. Where kernels overlap, the time is the one's that began first; what
    the device waits for after the host's planning is `host_plan`, all other waiting is `gap`."""
    costs: Costs = dict.fromkeys((part for part in PARTS if part != COMBINE or combine_kernels), 0.0)
    covered_us = step.begin_us
    for kernel, label in zip(step.kernels, labels, strict=True):
        part = label.phase
        if part == phases.ATTENTION and any(name in kernel.name for name in combine_kernels):
            part = COMBINE
        waited_us = idle(max(0.0, kernel.start_us - covered_us))
        costs[phases.HOST_PLAN if label.planned else GAP] += waited_us
        costs[part] += max(0.0, kernel.end_us - max(kernel.start_us, covered_us))
        covered_us = max(covered_us, kernel.end_us)
    return costs
