"""A sweep's report.html: every row, what it failed of, which choice wins, and each row in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fa_research.compare.comparison import Comparison
from fa_research.compare.estimates import estimate
from fa_research.compare.html import MOST_BYTES, bullets, figure, frame, machine, sentence, table
from fa_research.compare.keys import ABSENT, short, text_of
from fa_research.compare.names import quantity
from fa_research.compare.overview import USABLE, Sweep
from fa_research.compare.page import banner_box, cells_table, regret_table
from fa_research.compare.reading import TIMED, Record
from fa_research.compare.row_sections import environment_section, name_of, row_sections
from fa_research.compare.wording import caveats, regret_summary, summary
from fa_research.tracking import Row, Status
from fa_research.tracking.columns import format_value

_MOST_METRICS = 8
_MAIN_ENDINGS = (
    "bits_per_byte",
    "top1_agreement",
    "_step_us",
    "_pass_us",
    "prefill_us",
    "ttft_us",
    "itl_us",
    "_tokens_per_s",
    "attention_us",
    "_host_us",
    "_roof_fraction",
    "ledger_sum_fraction",
)
Drawn = Sequence[Sequence[tuple[Comparison | None, Sequence[tuple[str, str]]]]]


def sweep_page(sweep: Sweep, drawn: Drawn) -> str:
    """The page as HTML.

    Args:
        drawn: for each part of the sweep, and each comparison in it (None: all of its rows), SVGs with captions.

    Past 2 MB the rows' details are left out, then the largest figures; the page says so.
    """
    limit, made = 0, _page(sweep, drawn, details=True)
    if len(made.encode()) > MOST_BYTES:
        made = _page(sweep, drawn, details=False)
    sizes = sorted(len(svg) for part in drawn for _, figures in part for svg, _ in figures)
    while len(made.encode()) > MOST_BYTES and sizes:
        limit = sizes.pop()
        kept = [[(c, [f for f in figures if len(f[0]) < limit]) for c, figures in part] for part in drawn]
        made = _page(sweep, kept, details=False, left_out=True)
    return made


def _page(sweep: Sweep, drawn: Drawn, details: bool, left_out: bool = False) -> str:
    title = f"Sweep {sweep.folder.resolve().name}"
    studies = {str(record.config["study"]) for record in sweep.records if record.config.get("study")}
    if len(studies) == 1:
        title = f"Sweep {studies.pop()}"
    parts = [*_head(sweep, title)]
    if left_out:
        parts.append(
            '<p class="small">Some figures are too large for this page: they are PNGs beside it.</p>'
        )
    for part, figures in zip(sweep.parts, drawn, strict=True):
        parts += _part(part.metric, figures)
    parts += [*_overview(sweep), *_doubtful(sweep)]
    parts += [*_notes(sweep), *environment_section(sweep), *row_sections(sweep, details)]
    return frame(title, "\n".join(parts))


def _head(sweep: Sweep, title: str) -> Iterator[str]:
    used = [record for record in sweep.records if record.row.status in USABLE] or sweep.records
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="muted">{escape(machine(used, sweep.records))}</p>'
    swept = ", ".join(f"{key.removesuffix('.name')}" for key in sweep.keys) or "nothing"
    yield f'<p class="lead">Swept: {escape(swept)}.</p>'
    asked = [comparison for part in sweep.parts for comparison in part.asked]
    yield from dict.fromkeys(box for comparison in asked if (box := banner_box(comparison)))
    if ranked := [comparison for comparison in asked if comparison.ranked]:
        yield bullets(sentence(f"{quantity(c.metric)}: {regret_summary(c)}") for c in ranked)
    links = [(f"part-{part.metric}", quantity(part.metric)) for part in sweep.parts]
    links += [("overview", "Every row")] + [("doubtful", "Not ok")] * bool(sweep.doubtful)
    links += [("notes", "Notes"), ("environment", "Environment"), ("rows", "Rows in full")]
    anchors = (f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    yield f"<nav>{''.join(anchors)}</nav>"


def _metrics(sweep: Sweep) -> list[str]:
    """Columns of the overview: times first, then what explains them."""
    names = dict.fromkeys(
        name
        for record in sweep.records
        for name, value in record.row.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    lead = [part.metric for part in sweep.parts]
    rest = [
        name for ending in _MAIN_ENDINGS for name in names if name.endswith(ending) and "_ledger_" not in name
    ]
    rest += [name for name in names if name.startswith("trace_")]
    rest += [name for name in names if name.endswith("_ledger_sum_fraction")]
    return list(dict.fromkeys([*lead, *rest]))[:_MOST_METRICS]


def _overview(sweep: Sweep) -> Iterator[str]:
    metrics = _metrics(sweep)
    keys = [(short(key, sweep.keys), "") for key in sweep.keys]
    head = [
        ("row", ""),
        ("status", "text"),
        *keys,
        ("check", "text"),
        *((quantity(name), "") for name in metrics),
    ]
    yield '<h2 id="overview">Every row</h2>'
    lines = [_line(sweep, record, metrics) for record in sweep.records]
    yield table(head, lines)
    yield (
        '<p class="small">Numbers lead to their rows. In brackets the 95 % interval of a median, from the samples of '
        "its run and the drift between runs. Check: the largest error against float64 as a share of what is "
        "tolerated.</p>"
    )


def _line(sweep: Sweep, record: Record, metrics: Sequence[str]) -> str:
    place, row = sweep.number_of(record), record.row
    kind, why = (
        "text" if row.status is Status.ok else "text status",
        escape("; ".join(row.reasons), quote=True),
    )
    cells = f'<td><a href="#row-{place}">{place}</a></td><td class="{kind}" title="{why}">{row.status}</td>'
    for key in sweep.keys:
        cells += f"<td>{escape(text_of(record.config.get(key, ABSENT)))}</td>"
    leads = {part.metric for part in sweep.parts}
    cells += f'<td class="text"><a href="#row-{place}">{escape(_check(row))}</a></td>'
    for name in metrics:
        value = row.metrics.get(name)
        if value is None:
            cells += "<td></td>"
            continue
        bounds = _bounds(record, name) if name in leads else ""
        cells += f'<td><a href="#row-{place}">{escape(format_value(value))}</a>{bounds}</td>'
    return f"<tr>{cells}</tr>"


def _bounds(record: Record, metric: str) -> str:
    found = estimate(record, metric)
    if found is None or found.interval is None:
        return ""
    low, high = (format_value(float(end)) for end in found.interval)
    return f' <span class="small">[{low}, {high}]</span>'


def _check(row: Row) -> str:
    """How near the largest error came to what is tolerated, or that nothing was checked."""
    if row.status not in TIMED:
        return ""
    checks = row.checks
    verdicts = [name for name in checks if name.endswith("_passed")]
    said = []
    for name in verdicts:
        stem = name.removesuffix("_passed")
        error, tolerance = checks.get(f"{stem}_max_error"), checks.get(f"{stem}_tolerance")
        share = ""
        if isinstance(error, int | float) and isinstance(tolerance, int | float) and tolerance > 0:
            share = f" {error / tolerance * 100:.0f} %"
        said.append(f"{'' if checks[name] else 'failed '}{stem}{share}")
    return "; ".join(said) or "not checked"


def _doubtful(sweep: Sweep) -> Iterator[str]:
    """Rows without a time or with one that is suspect, by what they say of it."""
    if not sweep.doubtful:
        return
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in sweep.doubtful:
        said = "; ".join(record.row.reasons) or "no reason was given"
        grouped.setdefault((str(record.row.status), said), []).append(record)
    yield '<h2 id="doubtful">Not ok</h2>'
    lines = []
    for (status, said), records in grouped.items():
        links = ", ".join(
            f'<a href="#row-{n}" title="{escape(name_of(sweep, r), quote=True)}">{n}</a>'
            for r in records
            for n in [sweep.number_of(r)]
        )
        lines.append(
            f'<tr><td class="text status">{status}</td><td>{len(records)}</td><td class="wrap">{escape(said)}</td>'
            f'<td class="wrap">{links}</td></tr>'
        )
    yield table([("status", "text"), ("rows", ""), ("reason", "text"), ("which", "text")], lines)


def _part(metric: str, drawn: Sequence[tuple[Comparison | None, Sequence[tuple[str, str]]]]) -> Iterator[str]:
    yield f'<h2 id="part-{metric}">{escape(quantity(metric).capitalize())}</h2>'
    for comparison, figures in drawn:
        if comparison is None:
            yield from (figure(svg, caption) for svg, caption in figures)
            continue
        yield f"<h3>{escape(comparison.question.title)}</h3>"
        yield f"<p>{escape(sentence(regret_summary(comparison)))}</p>"
        yield bullets(summary(comparison))
        yield from (figure(svg, caption) for svg, caption in figures)
        yield f"<details><summary>Every cell by {escape(comparison.question.title)}</summary>"
        yield from cells_table(comparison)
        yield "</details>"
        if len(comparison.cells) > 1 and comparison.regrets[0]:
            yield "<details><summary>Regret as a table</summary>"
            yield from regret_table(comparison)
            yield "</details>"


def _notes(sweep: Sweep) -> Iterator[str]:
    leads = [part.asked[0] for part in sweep.parts if part.asked]
    lines = [line for comparison in leads for line in caveats(comparison)]
    yield '<h2 id="notes">Notes</h2>'
    yield (
        bullets(dict.fromkeys(map(sentence, [*lines, *sweep.notes])))
        if lines or sweep.notes
        else "<p>None.</p>"
    )
