"""Is a result right? Judged as flash-attention's own tests judge: against float64, and against what the same
computation loses in the low precision itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# What rounding the output alone may add, as a share of the largest reference value.
_CONSTANT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Errors against float64. `max_error` of the checked result and `baseline_error` of the plain
    low-precision one are largest absolute differences; the result passes while max_error <= tolerance = 2 *
    baseline_error + constant."""

    max_error: float
    baseline_error: float
    tolerance: float
    relative_error: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance  # False for NaN

    def checks(self, name: str) -> dict[str, float | bool]:
        """Columns named after `name`."""
        return {
            f"{name}_max_error": self.max_error,
            f"{name}_baseline_error": self.baseline_error,
            f"{name}_tolerance": self.tolerance,
            f"{name}_relative_error": self.relative_error,
            f"{name}_passed": self.passed,
        }


def judge(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    """The verdict over (result, low-precision baseline, float64 reference) triples of equal shapes."""
    error = baseline_error = largest = error_square = reference_square = 0.0
    dtype, compared = torch.float64, False
    for result, baseline, reference in triples:
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
    return Verdict(error, baseline_error, tolerance, relative)


def _largest(so_far: float, values: Tensor) -> float:
    """The maximum, NaN if any is NaN (Python's `max` would lose it)."""
    return torch.maximum(torch.tensor(so_far, dtype=torch.float64), values.max().double().cpu()).item()
