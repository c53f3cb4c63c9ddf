"""Is a result right? Judged as flash-attention's own tests judge: against float64, and against what the same
computation loses in the low precision itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What rounding the output alone may add, as a share of the largest reference value.
_CONSTANT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Errors against float64. `max_error` of the checked result and `baseline_error` of the plain
    low-precision one are largest absolute differences; the result passes while max_error <= tolerance = 2 *
    baseline_error + constant * largest reference value. `fault` says which side has NaN or infinite values,
    anywhere in what was compared (empty: none): then nothing passes."""

    max_error: float
    baseline_error: float
    tolerance: float
    relative_error: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        numbers = (self.max_error, self.baseline_error, self.tolerance)
        return not self.fault and all(map(math.isfinite, numbers)) and self.max_error <= self.tolerance

    def checks(self, name: str) -> dict[str, float | bool]:
        """Columns named after `name`."""
        return {
            f"{name}_max_error": self.max_error,
            f"{name}_baseline_error": self.baseline_error,
            f"{name}_tolerance": self.tolerance,
            f"{name}_relative_error": self.relative_error,
            f"{name}_passed": self.passed,
        }


class _Finite:
    """Counts what is not finite on each side."""

    def __init__(self) -> None:
        self._counts = {side: [0, 0, 0] for side in ("result", "baseline", "reference")}  # NaN, infinite, all
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, *triple: Tensor) -> None:
        """Count one (result, baseline, reference)."""
        for (side, counts), values in zip(self._counts.items(), triple, strict=True):
            found = values.isnan().sum().item(), values.isinf().sum().item(), values.numel()
            self._counts[side] = [a + int(b) for a, b in zip(counts, found, strict=True)]
            self._dtypes[side] = values.dtype

    def fault(self) -> str:
        """In words, the side that the others depend on first; empty where everything is finite."""
        for side in ("reference", "baseline", "result"):
            nans, infinite, count = self._counts[side]
            if not nans + infinite:
                continue
            kinds = [
                f"{number:,} {kind}" for number, kind in ((nans, "NaN"), (infinite, "infinite")) if number
            ]
            found = f"{' and '.join(kinds)} of {count:,} values"
            if side == "reference":
                return f"the float64 reference is not finite ({found}); nothing can be judged"
            if side == "result":
                return f"the result has {found}, the float64 reference and the baseline have none"
            return (
                f"the baseline {_overflow(self._dtypes['result'], infinite)} ({found}); nothing can be judged"
            )
        return ""


def _overflow(dtype: torch.dtype, infinite: int) -> str:
    """What became of a baseline whose reference is finite, with so many infinite values, and what helps."""
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    if dtype is torch.float16 and infinite:
        return f"in {name} overflows: its values pass {most:,.0f}; use model.dtype=bfloat16 or float32"
    return f"in {name} is not finite, although its float64 reference is; use a wider model.dtype"


def judge(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    """The verdict over (result, low-precision baseline, float64 reference) triples of equal shapes."""
    error = baseline_error = largest = error_square = reference_square = 0.0
    dtype, compared, finite = torch.float64, False, _Finite()
    for result, baseline, reference in triples:
        finite.add(result, baseline, reference)
        dtype = result.dtype
        difference = (result.double() - reference.double()).abs()
        error = _largest(error, difference)
        baseline_error = _largest(baseline_error, (baseline.double() - reference.double()).abs())
        largest = _largest(largest, reference.double().abs())
        error_square += difference.square().sum().item()
        reference_square += reference.double().square().sum().item()
        compared = True
    assert compared, "nothing was compared"
    tolerance = _FACTOR * baseline_error + _CONSTANT[dtype] * largest
    relative = (error_square / reference_square) ** 0.5 if reference_square else float("nan")
    return Verdict(error, baseline_error, tolerance, relative, finite.fault())


def judge_rows(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    """The verdict over triples of shape [rows, ...], every row (a query) by its own tolerance; its errors are those of
    the row with the least margin. A query over few keys has large outputs and large errors: one tolerance for all would
    let pass whatever becomes of a query over many."""
    errors, baseline_errors, largest, constant, relative, fault = _rows(triples)
    tolerances = _FACTOR * baseline_errors + constant * largest
    worst = int((errors - tolerances).nan_to_num(nan=float("inf")).argmax())
    error_of_worst, baseline_of_worst, tolerance = (
        x[worst].item() for x in (errors, baseline_errors, tolerances)
    )
    return Verdict(error_of_worst, baseline_of_worst, tolerance, relative, fault)


def judge_median_row(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    """The verdict over triples of shape [rows, ...] (a request each) by the median of the rows' largest errors; any NaN
    or infinite value fails. For a mixture of experts in low precision: where two experts are nearly equal, rounding
    decides which of them a token takes, and for each computation these are other tokens. They are few, and far off
    whoever is right. A request with several rows is judged by its own too, as one that is wrong throughout is half of
    two; the verdict is that of the least margin."""
    triples = list(triples)
    several = [[triple] for triple in triples if len(triple[0]) > 2]
    verdicts = [_median(some) for some in [triples, *several]]
    worst = min(verdicts, key=lambda v: (v.passed, v.tolerance - v.max_error))
    return replace(worst, relative_error=verdicts[0].relative_error, fault=verdicts[0].fault)


def _median(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    errors, baseline_errors, largest, constant, relative, fault = _rows(triples)
    middle = len(errors) // 2  # of two, the larger: half of the rows may not hide behind the other half
    error, baseline_error, value = (
        x.sort().values[middle].item() for x in (errors, baseline_errors, largest)
    )
    error = error if errors.isfinite().all() else float("nan")
    return Verdict(error, baseline_error, _FACTOR * baseline_error + constant * value, relative, fault)


def _rows(
    triples: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, float, float, str]:
    """Of each row: largest error, largest error of the baseline, largest value; and the dtype's constant, the relative
    error of all, and what is not finite."""
    finite = _Finite()
    columns: list[Tensor] = []
    error_square = reference_square = 0.0
    constant = _CONSTANT[torch.float64]
    for result, baseline, reference in triples:
        constant = _CONSTANT[result.dtype]
        finite.add(result, baseline, reference)
        exact = reference.double().flatten(1)
        error, baseline_error = ((x.double().flatten(1) - exact).abs() for x in (result, baseline))
        columns.append(torch.stack([x.amax(1) for x in (error, baseline_error, exact.abs())]).cpu())
        error_square += error.square().sum().item()
        reference_square += exact.square().sum().item()
    assert columns, "nothing was compared"
    relative = (error_square / reference_square) ** 0.5 if reference_square else float("nan")
    errors, baseline_errors, largest = torch.cat(columns, 1)
    return errors, baseline_errors, largest, constant, relative, finite.fault()


def tolerances_of_rows(result: Tensor, baseline: Tensor, reference: Tensor) -> Tensor:
    """What `judge_rows` allows each row of [rows, ...], float64 [rows]."""
    exact = reference.double().flatten(1)
    baseline_errors = (baseline.double().flatten(1) - exact).abs().amax(1)
    return _FACTOR * baseline_errors + _CONSTANT[result.dtype] * exact.abs().amax(1)


def _largest(so_far: float, values: Tensor) -> float:
    """The maximum, NaN if any is NaN (Python's `max` would lose it)."""
    return torch.maximum(torch.tensor(so_far, dtype=torch.float64), values.max().double().cpu()).item()
