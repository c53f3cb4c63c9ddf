"""Names and values of a row as a reader meets them: which numbers are worth a column, in which words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fa_research.tracking.records import Row

_QUALITY = ("bits_per_byte", "decode_bits_per_byte", "top1_agreement")
_LATER = ("_bytes", "_pages", "oracle_bits_per_byte", "decode_top1_agreement", "perplexity", "scored_tokens")
# For a report: no column of a sweep's table.
DETAIL = re.compile(r"_ledger_|^ledger_|^self_test_|_(GB|TFLOP)_per_s$")
ASIDE = re.compile(rf"{DETAIL.pattern}|_(p\d+_\w+|count|relative_error)$|^timing_")  # no line of a single run
_FAMILY = re.compile(
    r"(?<=ledger_).+|(?<=self_test_).+|^.+(?=_(p\d+_\w+|count|relative_error|(GB|TFLOP)_per_s)$)"
)


def ledgers(metrics: dict[str, Any]) -> dict[str, str]:
    """The ledger of each unit in one line: its parts that took any time, in microseconds."""
    lines: dict[str, list[str]] = {}
    for name, value in metrics.items():
        unit, found, part = name.partition("_ledger_")
        if found and part.endswith("_us") and value:
            lines.setdefault(f"{unit}_ledger", []).append(f"{part[:-3]} {format_value(value)}")
    return {name: ", ".join(parts) for name, parts in lines.items()}


def families(names: Sequence[str]) -> str:
    """Names in short: all parts of a ledger are one, and so are the percentiles of all times."""
    return ", ".join(dict.fromkeys(_FAMILY.sub("*", name) for name in names))


def main_metrics(rows: Sequence[Row]) -> list[str]:
    """Names of the numbers worth a column: no percentiles, counts or settings. Quality, then times, then the rest."""
    names = dict.fromkeys(
        name for row in rows for name, value in row.metrics.items() if isinstance(value, int | float)
    )
    main = [name for name in names if not re.search(r"_(p\d+_\w+|count)$", name)]
    return sorted(main, key=lambda name: 0 if name in _QUALITY else 2 if name.endswith(_LATER) else 1)


def varying_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Dotted keys whose values differ between configs; a key that some configs lack varies too.

    Where a group's `name` varies, what comes with each name (the sizes of each model, the keys of each workload) is
    left out unless it differs between configs of one name.
    """
    flattened = [flat(config) for config in configs if config]
    keys = dict.fromkeys(key for config in flattened for key in config)
    return [key for key in keys if _varies(flattened, key)]


def _varies(configs: Sequence[dict[str, Any]], key: str) -> bool:
    group, _, rest = key.partition(".")
    if group == "model" and rest not in ("name", "path"):
        configs = [config for config in configs if not _is_unread(config)] or configs
    by_name: dict[str, set[str]] = {}
    for config in configs:
        name = str(config.get(f"{group}.name")) if rest != "name" else ""
        by_name.setdefault(name, set()).add(repr(config.get(key, "absent")))
    return any(len(values) > 1 for values in by_name.values())


def _is_unread(config: dict[str, Any]) -> bool:
    """Of a cell that failed before the checkpoint's files said what its model is: the sizes are those of the schema."""
    return bool(config.get("model.path")) and config.get("model.changed") is None


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; an empty dict is a value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def format_value(value: Any) -> str:
    """Numbers with four significant digits and thousands separators, everything else as it is."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
