"""The end of a sweep's page: what all rows were made with, and each row in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fa_research.compare.html import listing
from fa_research.compare.keys import ABSENT, title_of, varying
from fa_research.compare.overview import Sweep
from fa_research.compare.reading import Record
from fa_research.tracking import Status
from fa_research.tracking.columns import flat


def name_of(sweep: Sweep, record: Record) -> str:
    """The values of the swept keys."""
    return title_of({key: record.config[key] for key in sweep.keys if key in record.config})


def environment_section(sweep: Sweep) -> Iterator[str]:
    """What all rows were made with, and what differs between them."""
    common, differing = _shared([record.environment for record in sweep.records])
    yield '<h2 id="environment">Environment</h2>'
    yield f"<pre>{listing(_bare(common), exact=True) or 'nothing is the same in all rows'}</pre>"
    if differing:
        names = ", ".join(sorted(key.removeprefix("environment.") for key in differing))
        yield f'<p class="small">Differs between rows, and is in each: {escape(names)}.</p>'


def _shared(all_: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is the same in all of them, and the keys that are not."""
    known = [values for values in all_ if values]
    keys = dict.fromkeys(key for values in known for key in values)
    same = {
        k: v
        for k in keys
        if len({repr(values.get(k, ABSENT)) for values in known}) == 1
        for v in [known[0][k]]
    }
    return same, [key for key in keys if key not in same]


def _bare(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("environment."): value for key, value in values.items()}


def row_sections(sweep: Sweep, details: bool) -> Iterator[str]:
    """A section for each row with all that it holds, opened by its anchor."""
    differing = varying(sweep.records)
    common = {k: v for k, v in sweep.records[0].config.items() if k not in differing}
    _, own_facts = _shared([record.environment for record in sweep.records])
    yield '<h2 id="rows">Rows in full</h2>'
    yield (
        f'<details id="common"><summary>What all {len(sweep.records)} configs have in common ({len(common)} keys)'
        f"</summary><pre>{listing(common)}</pre></details>"
    )
    if details:
        yield '<p class="small"><label><input type="checkbox" id="all-rows"> open all rows</label></p>'
    else:
        yield '<p class="small">There are too many rows for their details to fit; the files named here have them.</p>'
    for record in sweep.records:
        yield _row(sweep, record, differing, own_facts, details)


def _row(sweep: Sweep, record: Record, differing: Sequence[str], facts: Sequence[str], details: bool) -> str:
    place, row = sweep.number_of(record), record.row
    kind = "" if row.status is Status.ok else ' class="status"'
    name = f'<a href="#row-{place}">row {place}</a> <span{kind}>{row.status}</span> {escape(name_of(sweep, record))}'
    said = "".join(f"<div>{escape(line)}</div>" for line in [*row.reasons, *row.notes])
    where = f'<div class="small">{escape(record.place)}, config {escape(record.hash)}, {escape(row.finished)}</div>'
    body = said + where
    if details:
        parts = {
            "config, besides what all have in common": listing(
                {key: record.config[key] for key in differing if key in record.config}
            ),
            "metrics": listing({k: v for k, v in row.metrics.items() if not isinstance(v, list)}, exact=True),
            "check": listing(flat(row.checks), exact=True),
            "environment, besides what is in all rows": listing(
                _bare({key: record.environment[key] for key in facts if key in record.environment}),
                exact=True,
            ),
        }
        body += "".join(
            f'<div class="small">{title}</div><pre>{text}</pre>' for title, text in parts.items() if text
        )
    return f'<section class="row" id="row-{place}"><h4>{name}</h4><div class="body">{body}</div></section>'
