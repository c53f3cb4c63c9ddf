"""From kernels to the model: a model's decode step predicted from rows of the attention path alone, and by how much the
prediction is off.

A step = attention path of all layers (metadata, KV write, attention: measured at `workload.level=attention`) + the rest
of the model, which at decode has to read its weights once. The rest is had in three ways: from the bytes and the copy
rate alone; from one measured cell; from all cells but the one that is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fa_research.compare.kernel_rows import KernelRows, key_of, path_us, rest_bytes
from fa_research.compare.keys import ABSENT, order_of, readable, text_of, varying
from fa_research.compare.machines import dirty_files, dirty_words
from fa_research.compare.reading import Record, load, told_on_failure
from fa_research.errors import ConfigError
from fa_research.text import plural
from fa_research.tracking import Status

STEP = "decode_step_us"
_IDLE = ("cuda_graph.batch_sizes", "workload.steps")  # what varies without a word to say on a step
_HOST_BOUND = (
    0.5  # share of a step that the host needs to launch it, from which on kernels do not tell the step
)
VARIANTS = {
    "bytes": "weights and logits at the measured copy rate; nothing is fitted",
    "one cell": "the rest of the model as measured in one cell, by its bytes",
    "leave one out": "the rest as the median of all other cells has it, by its bytes",
}


@dataclass(eq=False)
class Closed:
    """A model's row with what was predicted for it.

    Attributes:
        where: what varies between the cells.
        attention_us: the attention path over all layers, from kernel rows.
        source: the kernel rows, and how they were joined.
        predicted: microseconds of the step, by the name of the variant; a variant that cannot say is absent.
        rest_bytes: what the rest of the model reads and writes in a step; None: not known.
    """

    record: Record
    where: dict[str, Any]
    attention_us: float
    source: str
    rest_bytes: float | None
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> float:
        return float(self.record.row.metrics[STEP])

    @property
    def rest_us(self) -> float:
        return self.measured - self.attention_us

    def error(self, variant: str) -> float | None:
        """The prediction over the measurement, minus 1."""
        predicted = self.predicted.get(variant)
        return None if predicted is None else predicted / self.measured - 1


@dataclass(eq=False)
class Closure:
    """All cells, which of them the second variant was fitted to, and what a reader has to know."""

    records: list[Record]
    cells: list[Closed]
    fitted: list[Closed]
    notes: list[str]

    def summary(self) -> dict[str, tuple[float, float, Closed, int]]:
        """For each variant the median error, the worst (with its sign) and its cell, and of how many cells."""
        found = {}
        for variant in VARIANTS:
            errors = [(error, cell) for cell in self.cells if (error := cell.error(variant)) is not None]
            if errors:
                worst, cell = max(errors, key=lambda pair: abs(pair[0]))
                found[variant] = (median(abs(error) for error, _ in errors), worst, cell, len(errors))
        return found


def close(paths: Sequence[Path], *, across: bool = False) -> Closure:
    """Predict every decode step of a model in `paths` that rows of the attention path are there for.

    Raises ConfigError where there are no rows of either kind, or none that belong together, saying why.
    """
    records, notes = load(paths)
    with told_on_failure(notes):
        cells, fitted = _close(records, across, notes)
    return Closure(records, cells, fitted, notes)


def _close(records: Sequence[Record], across: bool, notes: list[str]) -> tuple[list[Closed], list[Closed]]:
    """The cells with their predictions, and those that others were fitted to."""
    decoding = [r for r in records if r.row.status is Status.ok and r.config.get("workload.name") == "decode"]
    kernels = [r for r in decoding if _level(r) == "attention" and path_us(r)]
    models = [r for r in decoding if _level(r) == "model" and _has_step(r)]
    if not kernels or not models:
        raise ConfigError(_what_is_missing(records, kernels, models))
    rows = KernelRows(kernels, across)
    if waiting := [record for record in models if _waits_for_host(record)]:
        notes.append(
            f"{len(waiting)} of {len(models)} rows of a model are left out: the host needs over half of their step to "
            "launch it (decode_step_host_us), and a sum of kernels says nothing of that"
        )
        models = [record for record in models if record not in waiting]
    cells, why = _with_kernels(models, rows)
    if not cells:
        raise ConfigError(
            f"no decode step of a model can be predicted from these kernel rows: {_shortest(why) if why else notes[-1]}"
        )
    if why:
        notes.append(f"{len(why)} of {len(models)} rows of a model have no kernel rows: {_shortest(why)}")
    _name(cells)
    fitted = [cell for group in _groups(cells) for cell in _predict(group)]
    if dirty_files(used := [*kernels, *(cell.record for cell in cells)]):
        notes.append(dirty_words([used]))
    if not any("bytes" in cell.predicted for cell in cells):
        notes.append("no row has roof_GB_per_s and model_weight_bytes: nothing is predicted from bytes alone")
    return cells, fitted


def _with_kernels(models: Sequence[Record], rows: KernelRows) -> tuple[list[Closed], list[str]]:
    """The rows of a model that have kernel rows, and why the others have none."""
    cells, why = [], []
    for record in models:
        found = rows.attention_us(record)
        if isinstance(found, str):
            why.append(f"{record.place}: {found}")
        else:
            cells.append(Closed(record, {}, *found, rest_bytes(record)))
    return cells, why


def _level(record: Record) -> Any:
    return record.config.get("workload.level")


def _has_step(record: Record) -> bool:
    value = record.row.metrics.get(STEP)
    return isinstance(value, int | float) and value > 0


def _waits_for_host(record: Record) -> bool:
    host = record.row.metrics.get("decode_step_host_us")
    return isinstance(host, int | float) and host > _HOST_BOUND * record.row.metrics[STEP]


def _what_is_missing(records: Sequence[Record], kernels: list[Record], models: list[Record]) -> str:
    levels = sorted({text_of(_level(record)) for record in records})
    needs = []
    if not kernels:
        needs.append(f"rows of workload=decode with workload.level=attention and {STEP}")
    if not models:
        needs.append(f"rows of workload=decode with workload.level=model and {STEP}")
    given = f"{plural(len(records), 'row')} with workload.level {' and '.join(levels)}"
    return f"a closure needs {' and '.join(needs)}, with status ok; given: {given}"


def _shortest(why: Sequence[str]) -> str:
    """The reason that is least far from a match, which has the fewest words."""
    return min(why, key=len)


def _name(cells: list[Closed]) -> None:
    records = [cell.record for cell in cells]
    keys = readable(varying(records), records) or ["workload.batch_size", "workload.context_len"]
    told = [key for key in keys if key not in _IDLE]
    if _places(records, told) == _places(records, keys):
        keys = told
    for cell in cells:
        cell.where = {key: cell.record.config.get(key, ABSENT) for key in keys}
    cells.sort(key=lambda cell: [order_of(value) for value in cell.where.values()])


def _places(records: Sequence[Record], keys: Sequence[str]) -> int:
    return len({tuple(repr(record.config.get(key, ABSENT)) for key in keys) for record in records})


def _groups(cells: Iterable[Closed]) -> list[list[Closed]]:
    """Cells whose rest is the same but for its bytes: one model, one machine, captured or not; any backend and page."""
    groups: dict[tuple[Any, ...], list[Closed]] = {}
    for cell in cells:
        model = tuple(sorted((k, repr(v)) for k, v in cell.record.config.items() if k.startswith("model.")))
        facts = (cell.record.row.environment.get("gpu"), key_of(cell.record)["cuda_graph.mode"])
        groups.setdefault((model, *facts), []).append(cell)
    return list(groups.values())


def _predict(group: list[Closed]) -> list[Closed]:
    """Fill in the predictions of cells that share a rest; returns the cell that the others were fitted to."""

    def size(cell: Closed) -> tuple[float, ...]:
        config = cell.record.config
        return tuple(config.get(f"workload.{key}") or 0 for key in ("batch_size", "context_len"))

    bytes_known = all(cell.rest_bytes for cell in group)
    weight = {id(cell): cell.rest_bytes or 1.0 if bytes_known else 1.0 for cell in group}
    rates = {id(cell): cell.rest_us / weight[id(cell)] for cell in group}
    first = min(group, key=size)
    for cell in group:
        roof = cell.record.row.metrics.get("roof_GB_per_s")
        if cell.rest_bytes and isinstance(roof, int | float) and roof > 0:
            cell.predicted["bytes"] = cell.attention_us + cell.rest_bytes / roof / 1e3
        if cell is not first:
            cell.predicted["one cell"] = cell.attention_us + rates[id(first)] * weight[id(cell)]
        if others := [rates[id(other)] for other in group if other is not cell]:
            cell.predicted["leave one out"] = cell.attention_us + median(others) * weight[id(cell)]
    return [first] if len(group) > 1 else []
