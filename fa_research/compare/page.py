"""report.html: one file that loads nothing, in the reader's light or dark, every number a link to its row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import Ratio
from fa_research.compare.html import MOST_BYTES, bullets, figure, frame, listing, machine, sentence, table
from fa_research.compare.keys import ABSENT, readable, short, text_of, varying
from fa_research.compare.names import number, quantity
from fa_research.compare.no_verdict import banner, verdict_title
from fa_research.compare.reading import Record
from fa_research.compare.verdicts import Regret
from fa_research.compare.wording import caveats, excess, outcome, regret_summary, summary
from fa_research.text import plural
from fa_research.tracking import Status
from fa_research.tracking.columns import flat, format_value


def page(comparison: Comparison, figures: Sequence[tuple[str, str]]) -> str:
    """The report as HTML.

    Args:
        figures: an SVG and its caption each.

    Past `MOST_BYTES` the rows' details are left out, then the largest figures; the page says so.
    """
    kept = list(figures)
    made = _page(comparison, kept, details=True)
    while len(made.encode()) > MOST_BYTES:
        made = _page(comparison, kept, details=False, left_out=len(figures) - len(kept))
        if not kept:
            break
        kept.remove(max(kept, key=lambda figure: len(figure[0])))
    return made


def _page(
    comparison: Comparison, figures: Sequence[tuple[str, str]], details: bool, left_out: int = 0
) -> str:
    title = f"{comparison.question.title} by {quantity(comparison.metric)}"
    body = "\n".join(_body(comparison, figures, title, details, left_out))
    return frame(title, body)


def _body(
    comparison: Comparison, figures: Sequence[tuple[str, str]], title: str, details: bool, left_out: int
) -> Iterable[str]:
    yield from _opening(comparison, title)
    yield _contents(bool(figures), _has_regret(comparison))
    if figures:
        yield '<h2 id="figures">Figures</h2><p class="small">Points, ticks and fields lead to their rows.</p>'
        yield from (figure(svg, caption) for svg, caption in figures)
    if left_out:
        count = plural(left_out, "figure is", "figures are")
        yield f'<p class="small">{count} too large for this page, and beside it as PNG.</p>'
    yield '<h2 id="cells">Every cell</h2>'
    yield from cells_table(comparison)
    if _has_regret(comparison):
        yield '<h2 id="regret">Regret of one choice everywhere</h2>'
        yield from regret_table(comparison)
    yield '<h2 id="notes">Notes</h2>'
    notes = [*caveats(comparison), *comparison.notes]
    yield bullets(map(sentence, notes))
    yield '<h2 id="rows">Rows</h2>'
    yield from _rows(comparison, details)


def _opening(comparison: Comparison, title: str) -> Iterable[str]:
    used = [entry.record for cell in comparison.cells for entry in cell.entries.values() if entry.estimate]
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="muted">{escape(machine(used, comparison.records))}</p>'
    yield banner_box(comparison)
    yield f'<p class="lead">{escape(sentence(regret_summary(comparison)))}</p>'
    yield bullets(summary(comparison))


def _has_regret(comparison: Comparison) -> bool:
    return len(comparison.cells) > 1 and bool(comparison.regrets[0])


def _contents(with_figures: bool, with_regret: bool) -> str:
    sections = {
        "figures": "Figures",
        "cells": "Every cell",
        "regret": "Regret",
        "notes": "Notes",
        "rows": "Rows",
    }
    links = (
        f'<a href="#{name}">{text}</a>'
        for name, text in sections.items()
        if (with_figures or name != "figures") and (with_regret or name != "regret")
    )
    return f"<nav>{''.join(links)}</nav>"


def banner_box(comparison: Comparison) -> str:
    """What a reader must know before any number: that there is no verdict, and why; "" where there is one."""
    said = banner(comparison)
    return f'<p class="banner" role="note">{escape(sentence(said))}</p>' if said else ""


def cells_table(comparison: Comparison) -> Iterable[str]:
    keys = list(comparison.cells[0].where)
    head = [(short(key, keys), "") for key in keys] + [(label, "") for label in comparison.labels]
    lines = []
    for place, (cell, verdict) in enumerate(zip(comparison.cells, comparison.verdicts, strict=True)):
        line = "".join(f"<td>{escape(text_of(value))}</td>" for value in cell.where.values())
        for label in comparison.labels:
            entry = cell.entries.get(label)
            if entry is None:
                line += "<td>-</td>"
                continue
            text = entry.status if entry.estimate is None else number(entry.estimate.value)
            kind = "status" if entry.estimate is None else "best" if label in verdict.best else ""
            line += f'<td class="{kind}"><a href="#row-{comparison.number_of(entry.record)}">{escape(text)}</a></td>'
        line += f'<td class="wrap">{escape(outcome(comparison, cell, verdict))}</td>'
        lines.append(f'<tr id="{comparison.anchor}-{place}">{line}</tr>')
    yield table([*head, (verdict_title(comparison), "text")], lines)
    marked = "; what no other beats is marked. In brackets the 95 % interval of the difference."
    said = f"{quantity(comparison.metric).capitalize()}, medians{marked if comparison.ranked else '.'}"
    yield f'<p class="small">{escape(said)}</p>'


def regret_table(comparison: Comparison) -> Iterable[str]:
    found, _ = comparison.regrets
    numbers = {id(cell): place for place, cell in enumerate(comparison.cells)}
    head = [(comparison.question.title, "text"), ("cells", ""), ("no number", ""), ("geometric mean", "")]

    def line(item: Regret) -> str:
        worst = f'<a href="#{comparison.anchor}-{numbers[id(item.worst_cell)]}">{escape(excess(Ratio(item.worst)))}</a>'
        where = escape(item.worst_cell.title) if item.worst > 1 else ""
        mean = f'<a href="#{comparison.anchor}-0">{escape(excess(item.mean))}</a>'
        counts = f"<td>{item.cells}</td><td>{item.failed}</td>"
        numbers_ = f'{counts}<td>{mean}</td><td>{worst}</td><td class="text">{where}</td>'
        return f'<tr><td class="text">{escape(item.label)}</td>{numbers_}</tr>'

    yield table([*head, ("worst", ""), ("worst at", "text")], map(line, found))


def _rows(comparison: Comparison, details: bool) -> Iterable[str]:
    records = comparison.records
    differing = varying(records)
    keys = readable(differing, records)
    common = {k: v for k, v in records[0].config.items() if k not in differing}
    yield (
        f'<details id="common"><summary>What all {len(records)} configs have in common ({len(common)} keys)</summary>'
        f"<pre>{listing(common)}</pre></details>"
    )
    if not details:
        yield '<p class="small">There are too many rows for their details to fit; the files named here have them.</p>'
    head = [("row", ""), ("status", "text"), ("hash", "text"), *((short(key, keys), "") for key in keys)]
    head += [(comparison.metric, ""), ("p10", ""), ("p90", ""), ("file and line", "text")]
    lines = (
        _row(comparison, record, keys) + (_details(record, differing, len(head)) if details else "")
        for record in records
    )
    yield table(head, lines)


def _row(comparison: Comparison, record: Record, keys: Sequence[str]) -> str:
    place = comparison.number_of(record)
    stem = comparison.metric.removesuffix("_us")
    metrics = [
        record.row.metrics.get(name) for name in (comparison.metric, f"{stem}_p10_us", f"{stem}_p90_us")
    ]
    values = [text_of(record.config.get(key, ABSENT)) for key in keys]
    values += ["" if value is None else format_value(value) for value in metrics]
    kind = "text" if record.row.status is Status.ok else "text status"
    return (
        f'<tr id="row-{place}"><td><a href="#row-{place}">{place}</a></td><td class="{kind}">{record.row.status}</td>'
        f'<td class="text">{escape(record.hash)}</td>{"".join(f"<td>{escape(value)}</td>" for value in values)}'
        f'<td class="text">{escape(record.place)}</td></tr>'
    )


def _details(record: Record, differing: Sequence[str], columns: int) -> str:
    """What a row says besides: reasons and notes in the open, the rest behind a click."""
    row = record.row
    own = {key: record.config[key] for key in differing if key in record.config}
    said = "".join(f'<div class="small">{escape(line)}</div>' for line in [*row.reasons, *row.notes])
    metrics = {name: value for name, value in row.metrics.items() if not isinstance(value, list)}
    parts = {"metrics": metrics, "check": flat(row.checks), "environment": record.environment}
    listings = "\n".join(listing(values, exact=True) for values in parts.values() if values)
    return (
        f'<tr class="more"><td></td><td colspan="{columns - 1}">{said}<details><summary>config, metrics, checks, '
        f'environment</summary><div class="small">config, besides <a href="#common">what all have in common</a></div>'
        f"<pre>{listing(own)}</pre><pre>{listings}</pre></details></td></tr>"
    )
