"""What a prediction from bytes leaves out of a step: the parts that the ledger of the model's own row has."""

from __future__ import annotations

from statistics import median

from fa_research.compare.closure import STEP, Closed, Closure
from fa_research.compare.names import percent
from fa_research.text import plural

_PATH = ("host_plan", "metadata", "kv_write", "attention", "combine")
MISSED = ("attention path", "model", "sampling", "gap", "no part")


def missed(cell: Closed) -> dict[str, float] | None:
    """Microseconds that the step took longer than predicted from bytes, by part (`MISSED`); they add up to the miss.

    The attention path beside the kernel rows', the model's kernels beside their bytes at the copy rate, sampling and
    gaps between kernels, of which the prediction knows nothing, and what the ledger's sum differs from the timed step
    by. None where the row has no ledger, or no bytes."""
    predicted = cell.predicted.get("bytes")
    metrics = cell.record.row.metrics
    ledger = {
        part: metrics.get(f"{STEP.removesuffix('_us')}_ledger_{part}_us") for part in (*_PATH, *MISSED[1:4])
    }
    known = {part: float(value) for part, value in ledger.items() if isinstance(value, int | float)}
    if predicted is None or len(known) < len(ledger):
        return None
    return {
        "attention path": sum(known[part] for part in _PATH) - cell.attention_us,
        "model": known["model"] - (predicted - cell.attention_us),
        "sampling": known["sampling"],
        "gap": known["gap"],
        "no part": cell.measured - sum(known.values()),
    }


def missed_line(closure: Closure) -> list[str]:
    """In words, what bytes leave out at the median, as shares of the step; nothing without ledgers."""
    found = [(cell, parts) for cell in closure.cells if (parts := missed(cell))]
    if not found:
        return []
    shares = {part: median(parts[part] / cell.measured for cell, parts in found) for part in MISSED}
    said = ", ".join(
        f"{part} {'+' if share >= 0 else '-'}{percent(abs(share))}" for part, share in shares.items()
    )
    cells = plural(len(found), "cell")
    return [f"what bytes miss, by the ledgers of {cells}, of the step at the median: {said}"]
