"""Which times may be judged. Those of a CPU, of Triton's interpreter and of a busy machine get no verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import quantiles

from fa_research.compare.reading import Record, is_number
from fa_research.text import plural
from fa_research.tracking import Status

_TIMES = ("_us", "_ms", "_s", "_seconds", "_per_s", "_roof_fraction", "_against_ratio")
BUSY = 2.0  # 90th over 10th percentile of the samples; idle GPUs and CPUs stay below 1.3
_OVERLAP_S = 0.05


def is_time(metric: str) -> bool:
    """Whether a metric is a time or made of one."""
    return metric.endswith(_TIMES)


def on_cpu(record: Record) -> bool:
    """Whether the row was computed on a CPU. Rows that do not say are taken for a GPU's."""
    known = record.row.environment
    if str(record.config.get("device")) == "cpu":
        return True
    return not known.get("gpu") and ("gpu" in known or "cpu" in known)


def device_reason(record: Record) -> str:
    """Why no time of this row's device counts; "" where it does."""
    if str(record.row.environment.get("triton_interpreter")).lower() == "true":
        return "under Triton's interpreter"
    return "on a CPU" if on_cpu(record) else ""


def scatter(record: Record, metric: str) -> float | None:
    """The 90th over the 10th percentile of the samples; None where neither samples nor percentiles were kept."""
    if len(samples := record.samples(metric)) >= 5:
        deciles = quantiles(samples, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    else:
        stem = metric.removesuffix("_us")
        low, high = (record.row.metrics.get(f"{stem}_{name}_us") for name in ("p10", "p90"))  # type: ignore[assignment]
    return high / low if is_number(low) and is_number(high) and low > 0 else None


def timed_together(records: Sequence[Record]) -> list[Record]:
    """The rows with a time that were made while another was made on the same device, in the order of their starts.

    A GPU is known by its `gpu_uuid`; rows that do not name it are not looked at. CPUs are taken for one where model and
    sweep (or file) are the same.
    """
    by_device: dict[tuple[str, ...], list[tuple[datetime, datetime, Record]]] = {}
    for record in records:
        device = _device(record)
        span = _span(record)
        if device and span and record.row.status in (Status.ok, Status.suspect):
            by_device.setdefault(device, []).append((*span, record))
    found: list[Record] = []
    for spans in by_device.values():
        spans.sort(key=lambda span: span[0])
        for (_, end, first), (start, other_end, second) in zip(spans, spans[1:], strict=False):
            if (min(end, other_end) - start).total_seconds() > _OVERLAP_S:
                found += [record for record in (first, second) if record not in found]
    return found


def _device(record: Record) -> tuple[str, ...]:
    known = record.row.environment
    if on_cpu(record):
        return ("cpu", str(known.get("cpu")), str(record.source))
    return ("gpu", str(known["gpu_uuid"])) if known.get("gpu_uuid") else ()


def _span(record: Record) -> tuple[datetime, datetime] | None:
    try:
        start, end = map(datetime.fromisoformat, (record.row.started, record.row.finished))
        return (start, end) if end > start else None
    except (ValueError, TypeError):
        return None


def cell_reason(records: Iterable[Record], metric: str, together: set[int]) -> str:
    """Why the times of these rows, which would be compared, are not judged; "" where they are.

    together: the ids of the rows that `timed_together` found among all rows.
    """
    records = list(records)
    if not is_time(metric):
        return ""
    if devices := sorted({reason for record in records if (reason := device_reason(record))}):
        return f"timed {' and '.join(devices)}"
    if any(id(record) in together for record in records):
        return "timed while another cell ran on the same GPU"
    widest = max((found for record in records if (found := scatter(record, metric))), default=1.0)
    return f"the machine was busy: samples scatter by {widest:.1f}x" if widest > BUSY else ""


def contention(records: Sequence[Record], metric: str) -> list[str]:
    """What says that cells disturbed each other, a line each."""
    if not is_time(metric):
        return []
    lines = []
    if together := timed_together(records):
        kinds = {"CPU" if on_cpu(record) else "GPU" for record in together}
        lines.append(
            f"{plural(len(together), 'row was', 'rows were')} timed while another cell ran on the same "
            f"{' or '.join(sorted(kinds))}: they took time from each other"
        )
    scattered = [found for record in records if (found := scatter(record, metric)) and found > BUSY]
    if scattered:
        lines.append(
            f"{plural(len(scattered), 'row has', 'rows have')} samples that scatter by more than {BUSY:g}x (10th to "
            f"90th percentile; up to {max(scattered):.1f}x): the machine was busy with something else"
        )
    return lines
