"""Where a result that failed the oracle is off: computed on failure only, so it may take its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fa_research.measure.numerics import tolerances_of_rows

# Names the element with this index of a result [rows, ...].
Name = Callable[[tuple[int, ...]], str]


def where_off(
    triples: Iterable[tuple[Name, Tensor, Tensor, Tensor]], tolerance: float | None, rows: str
) -> str:
    """The worst value of (name, result, baseline, reference) of shapes [rows, ...], and how many are off.

    Args:
        tolerance: the largest error allowed; None: each row has its own, as in `judge_rows`.
        rows: what a row is called, in the plural.

    Values that are not finite come first. Empty where nothing is off.
    """
    worst, text = -1.0, ""
    off_values = off_rows = all_values = all_rows = 0
    for name, result, baseline, reference in triples:
        exact = reference.double().flatten(1)
        error = (result.double().flatten(1) - exact).abs()
        limit = (
            tolerances_of_rows(result, baseline, reference)[:, None]
            if tolerance is None
            else torch.full_like(error[:, :1], tolerance)
        )
        off = ~(error <= limit) | ~error.isfinite()
        off_values, off_rows = off_values + int(off.sum()), off_rows + int(off.any(1).sum())
        all_values, all_rows = all_values + off.numel(), all_rows + len(off)
        excess = (error - limit).nan_to_num(nan=torch.inf).masked_fill(~off, -1.0)
        excess = excess.masked_fill(~error.isfinite(), torch.inf)
        at = int(excess.argmax())
        if excess.flatten()[at].item() > worst:
            worst = excess.flatten()[at].item()
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), result.shape))
            values = ", ".join(
                f"{side} {x[index].item():.6g}"
                for side, x in (("result", result), ("float64", reference), ("baseline", baseline))
            )
            text = f"worst at {name(index)}: {values}"
    if not off_values:
        return ""
    return f"{text}; {off_values:,} of {all_values:,} values are off, in {off_rows:,} of {all_rows:,} {rows}"
