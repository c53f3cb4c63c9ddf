"""From records of kernels to the time of a sample."""

from __future__ import annotations

import random

import pytest
import torch

from fa_research.config import TimerKind
from fa_research.errors import ConfigError, TimingError
from fa_research.measure.cupti import (
    Interval,
    busy_ns,
    check_timer,
    cupti_problem,
    detach_problem,
    span_ns,
    split_by_marks,
)

MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def kernels(*times: tuple[int, int]) -> list[Interval]:
    return [Interval("kernel", start, end) for start, end in times]


@pytest.mark.parametrize(
    ("times", "busy", "span"),
    [
        ([], 0, 0),
        ([(10, 15)], 5, 5),
        ([(10, 15), (20, 30)], 15, 20),  # a gap
        ([(10, 20), (15, 30)], 20, 20),  # two streams
        ([(10, 50), (15, 30), (20, 25)], 40, 40),  # one inside another
        ([(20, 30), (10, 15)], 15, 20),  # in any order
    ],
)
def test_busy_time_and_span(times: list[tuple[int, int]], busy: int, span: int) -> None:
    assert (busy_ns(kernels(*times)), span_ns(kernels(*times))) == (busy, span)


def test_busy_time_is_the_number_of_nanoseconds_in_which_something_ran() -> None:
    rng = random.Random(0)
    for _ in range(50):
        times = [(start, start + rng.randrange(1, 30)) for start in (rng.randrange(100) for _ in range(8))]
        assert busy_ns(kernels(*times)) == len({ns for start, end in times for ns in range(start, end)})


def test_samples_are_what_lies_between_their_marks() -> None:
    """As recorded of two decode steps: a flush, a mark, the graph's kernels, the tokens' copy, a mark."""
    first = [Interval("flush", 0, 80), Interval(MARK, 81, 82), Interval("a", 83, 90), Interval("b", 92, 99)]
    first += [Interval("Memcpy DtoH (Device -> Pinned)", 100, 102), Interval(MARK, 104, 105)]
    second = [Interval("flush", 106, 180), Interval(MARK, 181, 182), Interval("Memset (Device)", 184, 185)]
    second += [Interval("Memcpy DtoD (Device -> Device)", 186, 187), Interval(MARK, 190, 191)]
    second.insert(
        2, plan := Interval("Memcpy HtoD (Pinned -> Device)", 182, 184)
    )  # the kernels behind it wait for it
    shuffled = random.Random(1).sample(first + second, len(first) + len(second))
    names = [[interval.name for interval in sample] for sample in split_by_marks(shuffled, 2)]
    assert names == [["a", "b"], [plan.name, "Memset (Device)", "Memcpy DtoD (Device -> Device)"]]
    with pytest.raises(TimingError, match="4 of 6 marks"):
        split_by_marks(shuffled, 3)
    with pytest.raises(TimingError, match=r"0 of 2 marks.*measure\.timer=events"):
        split_by_marks([], 1)


def test_where_there_is_no_cuda_it_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"measure\.timer=cupti: .*on cpu; use measure\.timer=events"):
        check_timer(TimerKind.cupti, cpu)
    check_timer(TimerKind.events, cpu)


def test_so_it_is_with_a_torch_that_has_no_cupti() -> None:
    lists_cuda = torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities()
    assert (cupti_problem(torch.device("cuda")) is None) == lists_cuda


@pytest.mark.parametrize(
    ("cuda", "possible"), [("12.6", True), ("13.0", True), ("12.4", False), (None, False)]
)
def test_it_is_refused_where_it_could_not_be_detached(cuda: str | None, possible: bool) -> None:
    problem = detach_problem(cuda)
    assert (problem is None) == possible
    if problem:
        assert "from CUDA 12.6 on" in problem and str(cuda) in problem
