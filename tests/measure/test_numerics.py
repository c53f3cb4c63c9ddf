"""The verdict: twice the low precision's own error plus a constant, and nothing that is NaN ever passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fa_research.measure.numerics import Verdict, judge, judge_median_row, judge_rows

ONE = torch.ones(4, dtype=torch.float64)
NAN = torch.tensor([1.0, float("nan"), 1.0, 1.0], dtype=torch.float64)


def off(error: float) -> Tensor:
    return ONE + torch.tensor([0.0, -error, 0.0, 0.0], dtype=torch.float64)


def test_twice_the_baseline_passes_and_more_does_not() -> None:
    assert judge([(off(0.02), off(0.01), ONE)]).passed
    assert not judge([(off(0.0201), off(0.01), ONE)]).passed
    assert judge([(off(0.0), off(0.01), ONE)]).passed


@pytest.mark.parametrize(
    ("dtype", "constant"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_the_constant_scales_with_the_reference(dtype: torch.dtype, constant: float) -> None:
    reference = 100 * ONE
    verdict = judge([(reference.to(dtype), reference, reference)])
    assert verdict.passed and verdict.tolerance == pytest.approx(100 * constant)


def test_nan_and_infinity_never_pass() -> None:
    infinite = off(float("inf"))
    for result, baseline, reference in [
        (NAN, ONE, ONE), (ONE, NAN, ONE), (ONE, ONE, NAN), (NAN, NAN, NAN),
        (infinite, ONE, ONE), (infinite, infinite, infinite),
    ]:  # fmt: skip
        assert not judge([(result, baseline, reference)]).passed
        assert not judge([(ONE, ONE, ONE), (result, baseline, reference)]).passed
        assert not judge([(result, baseline, reference), (ONE, ONE, ONE)]).passed
    assert math.isnan(judge([(NAN, ONE, ONE)]).max_error)


def test_one_wrong_triple_among_many() -> None:
    good = (off(0.001), off(0.01), ONE)
    bad = (off(0.5), off(0.01), ONE)
    for position in range(3):
        triples = [good, good]
        triples.insert(position, bad)
        verdict = judge(triples)
        assert not verdict.passed and verdict.max_error == pytest.approx(0.5)


def test_comparing_nothing_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="nothing was compared"):
        judge([])


def test_columns() -> None:
    columns = judge([(off(0.3), off(0.1), 2 * ONE)]).checks("logits")
    assert set(columns) == {
        f"logits_{name}" for name in ("max_error", "baseline_error", "tolerance", "relative_error", "passed")
    }
    assert columns["logits_max_error"] == pytest.approx(1.3)
    assert columns["logits_baseline_error"] == pytest.approx(1.1)
    assert columns["logits_relative_error"] == pytest.approx(math.sqrt((3 + 1.3**2) / 16))
    assert columns["logits_passed"] is True


def test_rows_are_judged_one_by_one() -> None:
    """An error that the largest row would excuse is not excused in a small one."""
    reference = torch.tensor([[4.0, -4.0], [0.01, 0.02], [0.0, 0.0]], dtype=torch.float64)
    baseline = reference.clone()
    baseline[0, 0] += 0.01
    result = reference.clone()
    result[1, 0] = 0.0
    as_bfloat16 = (result.bfloat16(), baseline, reference)
    assert judge([as_bfloat16]).passed
    verdict = judge_rows([as_bfloat16])
    assert not verdict.passed and verdict.max_error == pytest.approx(0.01)
    assert (verdict.baseline_error, verdict.tolerance) == (0.0, pytest.approx(8e-3 * 0.02))
    right = (reference.bfloat16(), baseline, reference)
    assert judge_rows([right]).passed and not judge_rows([right, as_bfloat16, right]).passed
    assert not judge_rows([(result.bfloat16() * float("nan"), baseline, reference)]).passed
    with pytest.raises(AssertionError, match="nothing was compared"):
        judge_rows([])


def test_the_median_row_forgives_few_rows_and_no_nan() -> None:
    reference = torch.ones(9, 4, dtype=torch.float64)
    baseline = (reference + 0.01).bfloat16()
    result = baseline.clone()
    result[:4] += 5.0
    assert judge_median_row([(result, baseline, reference)]).passed
    assert not judge([(result, baseline, reference)]).passed
    assert not judge_median_row([(baseline + 0.25, baseline, reference)]).passed
    result[0, 0] = float("nan")
    assert not judge_median_row([(result, baseline, reference)]).passed


def test_the_median_row_forgives_no_request_that_is_wrong_throughout() -> None:
    reference = torch.ones(9, 4, dtype=torch.float64)
    baseline = (reference + 0.01).bfloat16()
    right, wrong = (baseline, baseline, reference), (baseline + 5.0, baseline, reference)
    few = (torch.cat([baseline[:4] + 5.0, baseline[4:]]), baseline, reference)
    assert judge_median_row([few, right, few]).passed
    verdict = judge_median_row([right, wrong, right])
    assert not verdict.passed and verdict.max_error > 4
    assert verdict.relative_error == judge([right, wrong, right]).relative_error


@pytest.mark.parametrize("verdict_of", [judge, judge_rows, judge_median_row])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["result", "baseline", "reference"])
def test_one_value_that_is_not_finite_fails_every_verdict_and_is_named(
    verdict_of: Callable[..., Verdict], bad: float, side: str
) -> None:
    """Also in a row that is neither the worst nor the median one."""
    sides = dict.fromkeys(("result", "baseline", "reference"), torch.ones(9, 4, dtype=torch.float64))
    assert verdict_of([tuple(sides.values())]).fault == ""
    sides[side] = sides[side].clone()
    sides[side][1, 2] = bad
    verdict = verdict_of([tuple(sides.values())])
    assert not verdict.passed and side in verdict.fault.split("(")[0]
    assert ("1 NaN" if math.isnan(bad) else "1 infinite") in verdict.fault


@pytest.mark.parametrize("verdict_of", [judge, judge_rows, judge_median_row])
def test_a_baseline_that_overflows_excuses_nothing(verdict_of: Callable[..., Verdict]) -> None:
    reference = torch.full((9, 4), 7e4, dtype=torch.float64)
    verdict = verdict_of([(reference.half(), reference.half(), reference)])
    assert not verdict.passed
    assert "float16 overflows: its values pass 65,504; use model.dtype=bfloat16 or float32" in verdict.fault
