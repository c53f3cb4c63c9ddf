"""A study run again: some of its cells by `run.py`, as a sweep, and how many numbers land where the study says."""

from __future__ import annotations

import csv
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text

import fa_research
from fa_research.compare.drift import Z95
from fa_research.compare.estimates import MAIN, Estimate, estimate
from fa_research.compare.keys import readable, title_of, varying
from fa_research.compare.names import number, percent
from fa_research.compare.quality import QUALITY
from fa_research.compare.reading import Record, load
from fa_research.compare.trust import contention, on_cpu
from fa_research.config import WORKLOADS, Config, to_plain
from fa_research.config.free_text import escape
from fa_research.errors import ConfigError
from fa_research.text import plural
from fa_research.tracking import CONSOLE, ROWS_FILE, Status

_OF_THE_RUN = ("study", "tracking", "sweep", "hydra")
_ROUNDING = 1e-3  # by which a quality may differ on another device; it has no drift from run to run
_DECIDED_BY_ROW = (
    "path",
    "dtype",
)  # of a model that a folder describes; besides them the keys that were changed


@dataclass(frozen=True)
class Again:
    """One number of a published row and of its rerun.

    Attributes:
        low, high: where the median of another run lies with 95 %.
        now: None where the rerun has no number; `why` says why.
        busy: that the rerun's samples tell of a busy machine; "" where they do not.
    """

    record: Record
    metric: str
    published: float
    low: float
    high: float
    now: float | None
    why: str = ""
    busy: str = ""

    @property
    def is_inside(self) -> bool:
        return self.now is not None and self.low <= self.now <= self.high

    @property
    def missed(self) -> float:
        """How far outside the interval the rerun lies, as a fraction of the nearer end; 0 inside."""
        if self.now is None or self.is_inside:
            return 0.0
        return self.now / self.high - 1 if self.now > self.high else 1 - self.now / self.low


def rerun_interval(found: Estimate) -> tuple[float, float]:
    """Where the median of one more run lies with 95 %: a prediction interval. To the variance of the published number
    (which may be of several runs) comes that of a new run, between runs and within one."""
    spread = 0.0 if found.draws is None else float(np.var(np.log(found.draws)))
    within = max(0.0, spread - found.sd**2) * found.runs
    sd = math.sqrt(spread + found.run_sd**2 + within)
    return found.value * math.exp(-Z95 * sd), found.value * math.exp(Z95 * sd)


def reproduce(
    paths: Sequence[Path], *, cells: int, seed: int, across: bool, out: Path | None = None
) -> tuple[list[Again], Path]:
    """Run a sample of the published cells again.

    Args:
        paths: a study's folder, or files of rows.
        cells: how many, drawn with `seed`; all where there are no more.
        across: also on another GPU than the rows'.
        out: the sweep's folder; None makes one in outputs/reproduce.

    Returns every number of every cell drawn, and the folder of the new rows.

    Raises ConfigError: no rows that `run.py` made and that are ok, another GPU, a folder that is not empty.
    """
    records, _ = load(paths)
    able = [record for record in records if record.row.status is Status.ok and _is_ours(record)]
    if not able:
        raise ConfigError(
            f"none of the {plural(len(records), 'row')} was made by run.py and is ok: a study with a script of "
            "its own is run again by the command in its README"
        )
    chosen = sorted(random.Random(seed).sample(able, min(cells, len(able))), key=able.index)
    _require_same_device(chosen, across)
    folder = out or _own_folder(paths)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty: the new rows go to a folder of their own")
    run_cells(chosen, folder)
    return [
        again for place, record in enumerate(chosen) for again in _held(record, folder / str(place))
    ], folder


def _is_ours(record: Record) -> bool:
    return {"backend", "workload", "kv", "model"} <= set(record.row.config)


def _require_same_device(records: Sequence[Record], across: bool) -> None:
    here = gpu_here()
    published = sorted({str(record.row.environment.get("gpu")) for record in records if not on_cpu(record)})
    if published and published != [here] and not across:
        raise ConfigError(
            f"the rows are of {' and '.join(published)}, and this machine has {here or 'no GPU'}: run this there, or "
            "compare with another device by --across"
        )


def gpu_here() -> str | None:
    """The name of this machine's first GPU by nvidia-smi; None without one. Loads no torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run(
        [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _own_folder(paths: Sequence[Path]) -> Path:
    first = paths[0].resolve()
    study = first.parent if first.is_file() else first
    name = study.parent.name if study.name == "results" else study.name
    return Path("outputs") / "reproduce" / f"{name}_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}"


def run_cells(records: Sequence[Record], folder: Path) -> None:
    """One sweep of `run.py`, a preset for each record; job number N is the N-th. A cell that fails leaves its row.

    Raises ConfigError where run.py is missing, or ends without a row for any cell.
    """
    script = Path(fa_research.__file__).parents[1] / "run.py"
    if not script.is_file():
        raise ConfigError(f"{script} is missing: --reproduce needs a checkout of the repository")
    with tempfile.TemporaryDirectory() as presets:
        names = []
        for place, record in enumerate(records):
            names.append(f"again_{place}")
            path = Path(presets) / "experiment" / f"{names[-1]}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(preset(record), encoding="utf-8")
        command = [sys.executable, str(script), "-m", "--config-dir", presets]
        command += [
            f"experiment={','.join(names)}",
            "study=reproduce",
            "tracking=disabled",
            "sweep.report=false",
        ]
        quoted = str(folder.resolve()).replace("\\", "\\\\").replace("'", "\\'")
        subprocess.run([*command, f"hydra.sweep.dir='{quoted}'"], check=False)
    if not any(folder.glob(f"*/{ROWS_FILE}")):
        raise ConfigError(f"run.py made no row in {folder}; what it said is above")


def preset(record: Record) -> str:
    """The config of a row as a preset of `run.py`. Keys that today's version does not have are left out."""
    config = {key: value for key, value in record.row.config.items() if key not in _OF_THE_RUN}
    workload = str(config["workload"]["name"])
    if workload not in WORKLOADS:
        raise ConfigError(f"{record.place}: there is no workload {workload} any more")
    known = _known(config, to_plain(Config(workload=WORKLOADS[workload]())))
    changed = known["model"].pop("changed", None) or []
    if known["model"].get("path") is not None:
        known["model"] = _model_of_folder(known["model"], changed)
    if on_cpu(record):
        known["device"] = "cpu"
    head = "# @package _global_\n"
    defaults = {"defaults": [{"override /workload": workload}]}
    return head + OmegaConf.to_yaml(OmegaConf.create(defaults | dict(escape(known))))


def _known(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose keys the schema has, at every depth; where the schema is empty, anything goes."""
    if not schema:
        return dict(values)
    return {
        key: _known(value, schema[key])
        if isinstance(value, dict) and isinstance(schema[key], dict)
        else value
        for key, value in values.items()
        if key in schema
    }


def _model_of_folder(model: Mapping[str, Any], changed: Sequence[str]) -> dict[str, Any]:
    """What a row with `model.path` was told of its model; the folder says the rest."""
    kept: dict[str, Any] = {key: model[key] for key in ("name", *_DECIDED_BY_ROW) if key in model}
    for dotted in changed:
        *groups, last = dotted.split(".")
        source: Any = model
        target = kept
        for group in groups:
            source, target = source[group], target.setdefault(group, {})
        target[last] = source[last]
    return kept


def _held(record: Record, folder: Path) -> list[Again]:
    """The main numbers of a published row beside those of its rerun in `folder`."""
    rerun: Record | None = None
    why = "no row"
    if (folder / ROWS_FILE).is_file():
        rerun = load([folder])[0][-1]
        why = "; ".join([str(rerun.row.status), *rerun.row.reasons])
    found = []
    for metric in (*MAIN, *QUALITY):
        if (published := estimate(record, metric)) is None:
            continue
        low, high = rerun_interval(published)
        if metric in QUALITY:
            low, high = (published.value * (1 + sign * _ROUNDING) for sign in (-1, 1))
        usable = rerun is not None and rerun.row.status in (Status.ok, Status.suspect)
        again = estimate(rerun, metric) if usable and rerun else None
        now = None if again is None else again.value
        busy = "; ".join(contention([rerun], metric)) if rerun and now is not None else ""
        found.append(
            Again(record, metric, published.value, low, high, now, "" if now is not None else why, busy)
        )
    return found


def summary(found: Sequence[Again]) -> list[str]:
    """How many numbers land inside, by how much the others miss, and which have none."""
    have = [again for again in found if again.now is not None]
    lines = []
    if have:
        inside = sum(again.is_inside for again in have)
        ratios = sorted(again.now / again.published for again in have if again.now)
        middle = math.exp(float(np.median(np.log(ratios)))) - 1
        lines.append(
            f"{inside} of {plural(len(have), 'number')} inside the published 95 % interval of a rerun; at the median "
            f"{'+' if middle >= 0 else '-'}{percent(abs(middle))} against the published"
        )
        if missed := sorted(again.missed for again in have if not again.is_inside):
            ends = dict.fromkeys(percent(end) for end in (missed[0], missed[-1]))
            lines.append(f"{plural(len(missed), 'other misses', 'others miss')} it by {' to '.join(ends)}")
    if busy := sum(bool(again.busy) for again in found):
        lines.append(
            f"{plural(busy, 'number is', 'numbers are')} of a busy machine by their scatter: run again on an idle one"
        )
    for again in found:
        if again.now is None:
            lines.append(f"no {again.metric} from the rerun of {again.record.place}: {again.why}")
    return lines


def write_csv(found: Sequence[Again], folder: Path) -> Path:
    """reproduction.csv: a line for each number."""
    path = folder / "reproduction.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["row", "config_hash", "metric", "published", "low", "high", "now", "inside", "missed", "why"]
        )
        for a in found:
            place = (a.record.place, a.record.hash, a.metric, a.published, a.low, a.high)
            writer.writerow([*place, a.now, a.is_inside, a.missed, a.why])
    return path


def show(found: Sequence[Again], folder: Path) -> None:
    """The table, the summary, and where the rows are."""
    records = [again.record for again in found]
    keys = readable(varying(records), records)
    table = Table(box=None, pad_edge=False)
    for head in ("cell", "metric", "published", "95 % of reruns", "now", "difference", ""):
        table.add_column(head, justify="left" if head in ("cell", "metric", "") else "right", overflow="fold")
    for a in found:
        where = (
            title_of({key: a.record.config[key] for key in keys if key in a.record.config}) or "the only cell"
        )
        line = [where, a.metric, number(a.published), f"{number(a.low)} to {number(a.high)}"]
        if a.now is None:
            line += ["-", "", "no number"]
        else:
            off = a.now / a.published - 1
            said = "inside" if a.is_inside else f"misses by {percent(a.missed)}"
            line += [number(a.now), f"{'+' if off >= 0 else '-'}{percent(abs(off))}", said]
        table.add_row(*map(Text, line))
    CONSOLE.print(table)
    for text in summary(found):
        CONSOLE.print(Text(text), soft_wrap=True)
    CONSOLE.print(f"new rows and reproduction.csv in {folder}", soft_wrap=True, markup=False)
