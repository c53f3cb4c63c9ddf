"""Rows of any number of folders and files, each with its place, its config made flat and the samples kept beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from fa_research.compare.drift import Drift
from fa_research.compare.row_files import read_series, row_files, what_it_is
from fa_research.config import WORKLOADS, Config, config_hash, to_plain
from fa_research.config.hashing import NOT_HASHED
from fa_research.errors import ConfigError, FaResearchError
from fa_research.text import plural
from fa_research.tracking import ROWS_FILE, Row, Status
from fa_research.tracking.columns import flat
from fa_research.tracking.environment import NOT_TIMED
from fa_research.tracking.records import rows_and_torn
from fa_research.tracking.wandb_mirror import SERIES_FILE

TIMED = frozenset({Status.ok, Status.suspect, Status.inaccurate})
_MACHINE = ("gpu", "gpu_driver", "cuda", "python")
_CPU = ("cpu", "cpu_threads")  # they count where there is no GPU
# Facts of the code.
PACKAGE, COMMIT = "code.package", "git_commit"
NO_FINGERPRINT = "made before fingerprints"
_MOST_TORN = 5  # lines of one file that are named singly
_SWEEP_FILES = (ROWS_FILE, "multirun.yaml")


@dataclass(eq=False)
class Record:
    """A row and where it is.

    Attributes:
        line: number of its line in `path`, from 1.
        config: the row's config with dotted keys, and today's defaults for the keys that its version did not have.
        filled: the keys of `config` that are such defaults.
        estimates: what `estimates.estimate` has made of its metrics so far.
        plugins: the digests of the user's modules that tell its code from that of other rows, by fact.
        replicates: earlier runs of the same config by the same code on the same kind of machine.
        drift: how much runs differ, of all records that were read together.
    """

    row: Row
    path: Path
    line: int
    config: dict[str, Any] = field(default_factory=dict)
    filled: frozenset[str] = frozenset()
    estimates: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    replicates: list[Record] = field(default_factory=list)
    drift: Drift = field(default_factory=Drift)

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    @cached_property
    def hash(self) -> str:
        return self.row.config_hash or (config_hash(self.row.config) if self.row.config else "")

    @cached_property
    def source(self) -> Path:
        """What one version of the code wrote: the folder of the row's sweep, else its file."""
        above = self.path.parent.parent
        return above if any((above / name).exists() for name in _SWEEP_FILES) else self.path

    @cached_property
    def sweep(self) -> Path | None:
        """The folder of its sweep, None where it is of none."""
        folder = self.path.parent
        return (
            folder
            if any(folder.glob(f"*/{ROWS_FILE}"))
            else self.source
            if self.source != self.path
            else None
        )

    @cached_property
    def machine(self) -> dict[str, str]:
        """GPU (or CPU), versions and code: what two rows must have in common to be compared without `--across`."""
        known = self.row.environment
        names = (*_MACHINE, *(() if known.get("gpu") else _CPU))
        packages = {k: v for k, v in (known.get("packages") or {}).items() if k not in NOT_TIMED}
        facts = {name: known.get(name) for name in names} | {f"packages.{k}": v for k, v in packages.items()}
        return {key: str(value) for key, value in sorted((facts | self._code).items()) if value is not None}

    @property
    def _code(self) -> dict[str, Any]:
        """Two commits may have the same code, and one commit several, where files were not committed: the fingerprint
        counts, and the commit only of rows that have none."""
        if self.code:
            return {PACKAGE: self.code.get("package")} | self.plugins
        return {PACKAGE: NO_FINGERPRINT, COMMIT: self.row.environment.get(COMMIT)}

    @property
    def code(self) -> dict[str, Any]:
        """The fingerprint of the code that made the row; {} of rows that were made before there were fingerprints."""
        found = self.row.environment.get("code")
        return found if isinstance(found, dict) else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The row's environment with dotted keys that begin with `environment.`."""
        return flat({"environment": self.row.environment}) if self.row.environment else {}

    def samples(self, metric: str) -> tuple[float, ...]:
        """The single timings that `metric` is the median of, or () where none were kept."""
        if own := self.row.samples.get(metric):
            return tuple(float(v) for v in own)
        value = self.row.metrics.get(metric)
        stem = metric.removesuffix("_us")
        kept = [self.row.metrics.get(name) for name in (f"{stem}_samples_us", "samples_us")]
        kept += [values for name, values in self._series if name.rpartition("/")[2] == metric]
        for values in kept:
            if isinstance(values, list) and values and _is_median(values, value):
                return tuple(float(v) for v in values)
        return ()

    @cached_property
    def _series(self) -> list[tuple[str, list[Any]]]:
        """Newest first: a repeated cell appends to the file of the attempt before."""
        return read_series(self.path.parent / SERIES_FILE)[::-1]


def _is_median(values: list[Any], value: Any) -> bool:
    """Whether these samples are those of this row; samples may have been rounded."""
    if not is_number(value) or not all(map(is_number, values)):
        return False
    return abs(median(values) - value) <= 1e-3 * abs(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a finite number that a float can hold, which an integer in JSON need not be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


@contextmanager
def told_on_failure(notes: Sequence[str]) -> Iterator[None]:
    """An error that ends the work takes the notes made so far with it (`__notes__`): one of them may be its cause."""
    try:
        yield
    except FaResearchError as error:
        for note in notes:
            error.add_note(note)
        raise


def load(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """All records in the order read, the latest of each config, and what a reader has to know of them.

    Raises ConfigError for a path that is missing or holds no rows.
    """
    notes: list[str] = []
    records: list[Record] = []
    empty: list[str] = []
    for path in row_files(paths):
        rows, torn = rows_and_torn(path)
        records += [Record(row, path, line) for line, row in rows]
        what = "" if rows else what_it_is(path, torn)
        empty += [f"{path} {what}"] if what else []
        if rows and len(torn) > _MOST_TORN:
            notes += _told_once(path, torn)
        elif len(torn) <= _MOST_TORN and not what.startswith("is "):
            notes += torn
    with told_on_failure(notes):
        if not records:
            shown = "; ".join(empty[:_MOST_TORN]) + (
                f"; and {len(empty) - _MOST_TORN} more" * (len(empty) > _MOST_TORN)
            )
            raise ConfigError(f"no rows: {shown}. A row is a line of a rows.jsonl that run.py writes")
    for record in records:
        _drop_what_is_wrong(record, notes)
        _fill_in(record)
    notes += dict.fromkeys(said for record in records for said in _rename_columns(record))
    notes += _version_notes(records)
    records = _without_copies(records)
    _tell_plugins_apart(records)
    return _latest(records, notes), notes


def _tell_plugins_apart(records: Sequence[Record]) -> None:
    """Give the facts of their code to rows where several versions of a module of the user are among them. Rows that did
    not use the module go with its latest version."""
    versions: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda record: record.row.finished):
        for module, digest in (record.code.get("plugins") or {}).items():
            versions.setdefault(module, []).append(digest)
    several = {module: digests[-1] for module, digests in versions.items() if len(set(digests)) > 1}
    for record in records:
        if record.code:
            own = several | (record.code.get("plugins") or {})
            record.plugins = {f"code.plugins.{module}": own[module] for module in several}


def _told_once(path: Path, torn: Sequence[str]) -> list[str]:
    """One note for all the lines of a file that are no rows."""
    if not torn:
        return []
    reason = torn[0].partition("skipped ")[2].strip("()")
    lines = plural(len(torn), "line is no row and was", "lines are no rows and were")
    return [f"{path}: {lines} skipped; the first: {reason}"]


def _drop_what_is_wrong(record: Record, notes: list[str]) -> None:
    """Of a row that another program wrote: samples that are no numbers, packages without versions."""
    row = record.row
    for name, values in list(row.samples.items()):
        if not isinstance(values, list) or not all(map(is_number, values)):
            notes.append(
                f"{record.place}: the samples of {name} are no list of finite numbers and were dropped"
            )
            del row.samples[name]
    if not isinstance(row.environment.get("packages") or {}, dict):
        notes.append(f"{record.place}: environment.packages is no object and was dropped")
        del row.environment["packages"]
    row.reasons, row.notes = list(map(str, row.reasons)), list(map(str, row.notes))


@cache
def _defaults(workload: str) -> dict[str, Any]:
    schema = WORKLOADS.get(workload)
    return flat(to_plain(Config(workload=schema()))) if schema else {}


def _fill_in(record: Record) -> None:
    record.config = flat(record.row.config)
    ours = {"backend", "workload", "kv"} <= set(
        record.row.config
    )  # rows of scripts have configs of their own
    if not ours:
        return
    defaults = _defaults(str(record.config.get("workload.name")))
    missing = {
        key: value
        for key, value in defaults.items()
        if key.partition(".")[0] not in NOT_HASHED
        and key not in record.config
        and not any(old.startswith(f"{key}.") for old in record.config)
    }
    record.filled = frozenset(missing)
    record.config |= missing


# Columns that had another name: the old one, the workload, and today's.
_RENAMED = {
    ("prefill_tokens_per_s", "text"): "prefill_prompt_tokens_per_s",
    ("prefill_tokens_per_s", "extend"): "prefill_computed_tokens_per_s",
}


def _rename_columns(record: Record) -> list[str]:
    """Give columns of older rows their names of today; what was renamed, in words."""
    workload, metrics, said = record.config.get("workload.name"), record.row.metrics, []
    for (old, where), new in _RENAMED.items():
        if workload == where and old in metrics and new not in metrics:
            metrics[new] = metrics.pop(old)
            said.append(f"{old} of older rows is read as {new}")
    return said


def _version_notes(records: Iterable[Record]) -> list[str]:
    old = [record for record in records if record.filled]
    if not old:
        return []
    keys = sorted({key for record in old for key in record.filled})
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return [
        f"{plural(len(old), 'row is', 'rows are')} of another version of fa_research, without the keys "
        f"{shown}: today's defaults stand in for them"
    ]


def _without_copies(records: Sequence[Record]) -> list[Record]:
    """A sweep's rows.jsonl repeats those of its cells: of equal rows the one with samples beside it stays."""
    kept: dict[str, Record] = {}
    for record in records:
        row = record.row
        known = (row.config, row.metrics, row.reasons, row.environment)
        text = repr((row.status, row.started, row.finished, *known))
        has_series = (record.path.parent / SERIES_FILE).exists()
        if text not in kept or (has_series and not (kept[text].path.parent / SERIES_FILE).exists()):
            kept[text] = record
    return list(kept.values())


def _same_sweep(one: Record, other: Record) -> bool:
    return one.sweep is not None and one.sweep == other.sweep


def _is_replicate(later: Record, earlier: Record) -> bool:
    """Whether these are two runs of one code. Rows with uncommitted changes and without a fingerprint may be of two."""
    both = (later, earlier)
    if any(record.row.status is not Status.ok for record in both) or later.machine != earlier.machine:
        return False
    return all(record.code or not record.row.environment.get("git_dirty") for record in both)


def _latest(records: Sequence[Record], notes: list[str]) -> list[Record]:
    """One record for each config and machine, the one that finished last, with the others as its replicates where the
    same code made them. A failed one gives way to any later one, and one that its sweep has made again, as it does
    where the code has changed, to the newer one."""
    kept: list[Record] = []
    dropped: list[Record] = []
    drift = Drift()
    newest: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.row.finished, reverse=True):
        later = newest.setdefault(record.hash, []) if record.hash else []
        failed = record.row.status not in TIMED
        if run := next((other for other in later if _is_replicate(other, record)), None):
            run.replicates.append(record)
        elif any(failed or other.machine == record.machine or _same_sweep(other, record) for other in later):
            dropped.append(record)
        else:
            later.append(record)
            kept.append(record)
    if dropped:
        names = ", ".join(sorted({record.hash for record in dropped})[:5])
        notes.append(
            f"{plural(len(dropped), 'row')} of configs that were measured again later "
            f"({names}{', ...' if len({r.hash for r in dropped}) > 5 else ''}): the latest of each counts"
        )
    drift.groups = [[record, *record.replicates] for record in kept if record.replicates]
    for record in records:
        record.drift = drift
    if drift.groups:
        runs = sum(map(len, drift.groups))
        notes.append(
            f"{plural(len(drift.groups), 'config was', 'configs were')} measured in several runs ({runs} rows): the "
            "geometric mean of their medians counts, with the variance between runs in its interval"
        )
    order = {id(record): number for number, record in enumerate(records)}
    return sorted(kept, key=lambda record: order[id(record)])
