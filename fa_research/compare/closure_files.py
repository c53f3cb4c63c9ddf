"""A closure on the screen, as CSV, as Markdown and as a figure."""

from __future__ import annotations

import csv
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from fa_research.compare.closure import STEP, VARIANTS, Closed, Closure
from fa_research.compare.closure_ledger import MISSED, missed, missed_line
from fa_research.compare.keys import short, text_of, title_of
from fa_research.compare.names import number, percent
from fa_research.compare.out import writing_to
from fa_research.text import plural
from fa_research.tracking import CONSOLE
from fa_research.tracking.screen import show


def print_closure(closure: Closure) -> None:
    """Every cell with its predictions and their errors, and what they come to."""
    CONSOLE.print(Text("decode step of a model, predicted from its kernels (us)", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _head(closure):
        table.add_column(name, justify="right", overflow="fold")
    for cell in closure.cells:
        table.add_row(*map(Text, _line(closure, cell)))
    show(table)
    for line in summary(closure):
        CONSOLE.print(Text(line))
    CONSOLE.print()
    for line in notes(closure):
        CONSOLE.print(Text(f"note: {line}", style="dim"), soft_wrap=True)


def summary(closure: Closure) -> list[str]:
    """The median and the worst error of each way to predict, and what bytes leave out."""
    return [
        f"{variant}: {percent(middle)} off at the median, {_signed(worst)} at worst (at {title_of(cell.where)}), over "
        f"{plural(count, 'cell')}"
        for variant, (middle, worst, cell, count) in closure.summary().items()
    ] + missed_line(closure)


def notes(closure: Closure) -> list[str]:
    """How each prediction was made, and what is left out of it."""
    lines = [f"{variant}: {how}" for variant, how in VARIANTS.items() if variant in closure.summary()]
    lines += [
        f"one cell: fitted to {title_of(cell.where)} ({cell.record.place}), which has no error of its own"
        for cell in closure.fitted
    ]
    if between := sum(cell.source.startswith("between ") for cell in closure.cells):
        lines.append(
            f"{between} of {len(closure.cells)} attention times lie between two measured contexts, in proportion to "
            "the bytes of keys and values"
        )
    lines.append("contexts are those that a run began with: a step's own is longer by the steps before it")
    return lines + closure.notes


def _signed(error: float) -> str:
    return f"{'+' if error >= 0 else '-'}{percent(abs(error))}"


def _variants(closure: Closure) -> list[str]:
    return [variant for variant in VARIANTS if any(variant in cell.predicted for cell in closure.cells)]


def _head(closure: Closure) -> list[str]:
    keys = list(closure.cells[0].where)
    names = [name for variant in _variants(closure) for name in (variant, "error")]
    return [*(short(key, keys) for key in keys), "attention path", "measured step", *names]


def _line(closure: Closure, cell: Closed) -> list[str]:
    line = [text_of(value) for value in cell.where.values()] + [
        number(cell.attention_us),
        number(cell.measured),
    ]
    for variant in _variants(closure):
        error = cell.error(variant)
        line += ["-", "fitted"] if error is None else [number(cell.predicted[variant]), _signed(error)]
    return line


def write_closure(closure: Closure, folder: Path) -> list[Path]:
    """closure.csv, closure.md and closure.png.

    Raises ConfigError for a folder of results, where nothing can be written, and without the extra `report`; CSV and
    Markdown are written by then.
    """
    markdown, figure = folder / "closure.md", folder / "closure.png"
    with writing_to(folder) as written:
        written.append(_write_csv(closure, folder / "closure.csv"))
        written.append(_write_markdown(closure, markdown, False))
        from fa_research.compare.figures import require_altair

        require_altair()
        from fa_research.compare.figures.closure import closure_figure
        from fa_research.compare.figures.images import png

        figure.write_bytes(png(closure_figure(closure)))
        _write_markdown(closure, markdown, True)
        written.append(figure)
    return written


def _write_csv(closure: Closure, path: Path) -> Path:
    variants = _variants(closure)
    head = [*closure.cells[0].where, "attention_path_us", STEP, "rest_bytes"]
    head += [f"{variant.replace(' ', '_')}_{what}" for variant in variants for what in ("us", "error")]
    head += [f"missed_{part.replace(' ', '_')}_us" for part in MISSED]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, "fitted", "kernel_rows", "config_hash", "row"])
        for cell in closure.cells:
            made = [x for variant in variants for x in (cell.predicted.get(variant), cell.error(variant))]
            made += [(missed(cell) or {}).get(part) for part in MISSED]
            line = [*cell.where.values(), cell.attention_us, cell.measured, cell.rest_bytes, *made]
            writer.writerow([*line, cell in closure.fitted, cell.source, cell.record.hash, cell.record.place])
    return path


def _missed_table(closure: Closure) -> list[str]:
    found = [(cell, parts) for cell in closure.cells if (parts := missed(cell))]
    if not found:
        return []
    keys = list(found[0][0].where)
    rows = [[*(short(key, keys) for key in keys), "measured - bytes", *MISSED]]
    rows.append(["---"] * len(rows[0]))
    for cell, parts in found:
        values = [sum(parts.values()), *(parts[part] for part in MISSED)]
        rows.append(
            [*(text_of(value) for value in cell.where.values()), *(f"{value:+,.0f}" for value in values)]
        )
    return ["", "## What bytes miss (us)", "", *(f"| {' | '.join(row)} |" for row in rows)]


def _write_markdown(closure: Closure, path: Path, figure: bool) -> Path:
    lines = [
        "# A model's decode step, predicted from its kernels",
        "",
        *(f"- {s}" for s in summary(closure)),
        "",
    ]
    head = [*_head(closure), "row", "kernel rows"]
    rows = [[*_line(closure, cell), f"`{cell.record.place}`", f"`{cell.source}`"] for cell in closure.cells]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", "![Errors of the prediction](closure.png)"] * figure
    lines += _missed_table(closure)
    lines += ["", "## Notes", "", *(f"- {line}" for line in notes(closure))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
