"""Pairs: both run as often, in an order that is drawn, and the ratio is of what was taken."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from fa_research.config import L2State
from fa_research.measure.pairs import Pairs, time_pairs
from fa_research.measure.timing import Timer

CPU = torch.device("cpu")


def timer(device: torch.device = CPU) -> Timer:
    return Timer(device, warmup=2, max_seconds=1.0, l2=L2State.cold)


def test_every_pair_runs_both_in_an_order_that_is_drawn() -> None:
    calls: list[str] = []
    found = time_pairs(lambda: calls.append("a"), lambda: calls.append("b"), timer(), pairs=40)
    assert calls[:4] == ["a", "b", "a", "b"]
    pairs = list(zip(calls[4::2], calls[5::2], strict=True))
    assert len(pairs) == len(found.first_us) == len(found.second_us) == 40
    assert set(pairs) == {("a", "b"), ("b", "a")}
    assert 10 < pairs.count(("a", "b")) < 30


def test_times_go_to_the_one_they_are_of() -> None:
    x = torch.randn(300, 300)
    found = time_pairs(lambda: [x @ x for _ in range(8)], lambda: None, timer(), pairs=10)
    assert found.ratio == median(found.first_us) / median(found.second_us)
    assert found.ratio > 1  # eight matrix products against nothing: the sign of a difference, no time
    assert not found.is_tie


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        time_pairs(lambda: None, lambda: None, timer(), pairs=3)


@pytest.mark.gpu
@pytest.mark.quiet
def test_on_a_gpu_too() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    found = time_pairs(lambda: x @ x, lambda: x[:64] @ x, timer(torch.device("cuda")), pairs=10)
    assert found.low > 1


def test_an_interval_that_is_no_number_ranks_nobody() -> None:
    assert Pairs((), (), 1.0, float("nan"), float("nan")).is_tie
    assert not Pairs((), (), 0.8, 0.7, 0.9).is_tie and not Pairs((), (), 1.2, 1.1, 1.3).is_tie
