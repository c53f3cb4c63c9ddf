"""What the ledger makes of a trace: which kernel is of which phase, and where each microsecond goes."""

from __future__ import annotations

import pytest

from fa_research.measure.device_trace import Kernel, Segment, TraceCost, TraceError, segments
from fa_research.measure.ledger import GAP, Idle, Label, account, assign, labels
from fa_research.phases import ATTENTION, HOST_PLAN, KV_WRITE, METADATA, MODEL, SAMPLING


def kernels(*found: tuple[str, float, float]) -> tuple[Kernel, ...]:
    return tuple(Kernel(name, start, end) for name, start, end in found)


def named(*names: str) -> tuple[Kernel, ...]:
    return kernels(*[(name, 10.0 * i, 10.0 * i + 5) for i, name in enumerate(names)])


def free(idle_us: float) -> float:
    return idle_us


SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def test_delimiters_cut_a_trace() -> None:
    found = kernels(("early", 0, 1), (SPIN, 2, 3), ("a", 4, 5), ("b", 6, 9), (SPIN, 10, 11), (SPIN, 12, 13))
    first, second, third = segments(found, 3)
    assert (first.begin_us, [k.name for k in first.kernels], first.span_us) == (3, ["a", "b"], 6)
    assert (second.begin_us, second.kernels, second.span_us) == (11, (), 0)
    assert third == Segment(13, ())
    with pytest.raises(TraceError, match="saw 3 of 4 delimiters, and 6 kernels"):
        segments(found, 4)


def test_kernels_have_the_phase_of_their_segment_and_know_what_follows_planning() -> None:
    marked = [
        (None, Segment(0, named("before"))),
        (METADATA, Segment(0, named("fill"))),
        (HOST_PLAN, Segment(0, named("copy", "copy"))),
        (METADATA, Segment(0, ())),
        (None, Segment(0, ())),
        (MODEL, Segment(0, named("gemm"))),
        (ATTENTION, Segment(0, named("attend"))),
        (HOST_PLAN, Segment(0, ())),
        (ATTENTION, Segment(0, named("attend"))),
    ]
    assert list(labels(marked)) == [
        ("before", Label(MODEL)),
        ("fill", Label(METADATA)),
        ("copy", Label(HOST_PLAN, planned=True)),
        ("copy", Label(HOST_PLAN, planned=True)),
        ("gemm", Label(MODEL, planned=True)),
        ("attend", Label(ATTENTION)),
        ("attend", Label(ATTENTION, planned=True)),
    ]


def test_the_same_kernels_are_told_by_name_and_order() -> None:
    """The same name in two phases; neighbours that changed places on two streams."""
    labelled = [("add", Label(MODEL)), ("attend", Label(ATTENTION)), ("add", Label(SAMPLING))]
    assert assign(named("add", "attend", "add"), labelled) == [
        Label(MODEL), Label(ATTENTION), Label(SAMPLING)
    ]  # fmt: skip
    assert assign(named("attend", "add", "add"), labelled) == [
        Label(ATTENTION), Label(MODEL), Label(SAMPLING)
    ]  # fmt: skip


def test_other_kernels_are_told_by_name_or_not_at_all() -> None:
    labelled = [
        ("gemm", Label(MODEL)),
        ("add", Label(MODEL)),
        ("attend", Label(ATTENTION)),
        ("add", Label(SAMPLING)),
    ]
    assert assign(named("gemm", "gemm", "attend"), labelled) == [
        Label(MODEL), Label(MODEL), Label(ATTENTION)
    ]  # fmt: skip
    with pytest.raises(
        TraceError, match="ran 2 kernels and the marked pass 4, and add is of model and sampling"
    ):
        assign(named("gemm", "add"), labelled)
    with pytest.raises(TraceError, match="and splitk is of no phase that was marked"):
        assign(named("gemm", "splitk", "add", "attend", "add"), labelled)
    planned = [("gemm", Label(MODEL, planned=True)), ("add", Label(MODEL))]
    with pytest.raises(TraceError, match="and gemm is of model"):  # the wait for the host would be the gap's
        assign(named("gemm"), planned)


def test_a_step_is_accounted_for_to_its_end() -> None:
    step = Segment(
        100.0,
        kernels(
            ("fill", 103, 105),
            ("attend", 107, 117),
            ("x_combine_y", 117, 119),
            ("gemm", 120, 130),
            ("copy", 131, 132),
        ),
    )
    given = [Label(METADATA), Label(ATTENTION), Label(ATTENTION), Label(MODEL), Label(SAMPLING)]
    costs = account(step, given, ("combine",), free)
    expected = {
        METADATA: 2.0,
        ATTENTION: 10.0,
        "combine": 2.0,
        MODEL: 10.0,
        SAMPLING: 1.0,
        GAP: 7.0,
        KV_WRITE: 0.0,
    }
    assert costs == expected | {HOST_PLAN: 0.0}
    assert sum(costs.values()) == step.span_us
    without = account(step, given, (), free)
    assert "combine" not in without and without[ATTENTION] == 12


def test_overlap_is_counted_once() -> None:
    """The second begins inside the first and outlasts it, the third lies inside the second."""
    step = Segment(0.0, kernels(("gemm", 0, 10), ("attend", 8, 20), ("write", 11, 12), ("gemm", 22, 24)))
    given = [Label(MODEL), Label(ATTENTION), Label(KV_WRITE), Label(MODEL)]
    costs = account(step, given, ("combine",), free)
    assert (costs[MODEL], costs[ATTENTION], costs[KV_WRITE], costs[GAP]) == (12, 10, 0, 2)
    assert sum(costs.values()) == step.span_us == 24


def test_waiting_for_the_plan_is_host_plan() -> None:
    step = Segment(0.0, kernels(("fill", 1, 2), ("copy", 50, 51), ("gemm", 60, 70), ("gemm", 71, 80)))
    given = [Label(METADATA), Label(HOST_PLAN, True), Label(MODEL, True), Label(MODEL)]
    costs = account(step, given, (), free)
    assert (costs[HOST_PLAN], costs[GAP]) == (48 + 1 + 9, 2)


def test_idle_time_in_a_graph_loses_what_tracing_adds_to_each_kernel() -> None:
    idle = Idle(TraceCost(kernel_us=0.5, launch_us=9.0, idle_us=1.0), graph=True)
    assert [idle(us) for us in (2.0, 0.25, 0.0, 7.5)] == [1.5, 0, 0, 7]


def test_idle_time_outside_a_graph_loses_the_lateness_of_a_traced_host_where_it_waits_for_it() -> None:
    cost = TraceCost(kernel_us=0.5, launch_us=2.0, idle_us=1.0)
    idle = Idle(cost, graph=False)
    # All wait for the host, which loses 2 us a launch: each wait is 2 us too long, and 0.5 us for the device.
    assert [idle(us) for us in (7.5, 7.5, 7.5)] == [5, 5, 5]
    idle = Idle(cost, graph=False)
    # Two that had work queued: what the host lost until then nobody waited for.
    assert [idle(us) for us in (1.5, 1.5, 7.5)] == [1, 1, 5]
    idle = Idle(cost, graph=False)
    # Never below what lies between two kernels anyway; the rest is taken from the next wait.
    assert [idle(us) for us in (2.5, 7.5)] == [1, 4]
