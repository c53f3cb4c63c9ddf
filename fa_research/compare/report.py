"""All files of a comparison: what needs no figures first, so that it is there whatever becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fa_research.compare.comparison import Comparison
from fa_research.compare.files import write_csv, write_markdown
from fa_research.compare.out import writing_to


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """CSV, Markdown, PNGs and report.html into `folder`, which is made where it is missing.

    Raises ConfigError for a folder of results, where nothing can be written, and where the extra `report` is not
    installed; CSV and Markdown are written by then.
    """
    with writing_to(folder) as written:
        written += [*write_csv(comparison, folder), write_markdown(comparison, folder)]
        written.extend(_write_figures(comparison, folder))
    return written


def _write_figures(comparison: Comparison, folder: Path) -> Iterator[Path]:
    from fa_research.compare.figures import draw
    from fa_research.compare.figures.images import png, svg
    from fa_research.compare.page import page

    figures = draw(comparison)
    drawn = []
    for figure in figures:
        path = folder / f"{figure.name}.png"
        path.write_bytes(png(figure))
        drawn.append((svg(figure), figure.caption))
        yield path
    write_markdown(comparison, folder, [(figure.title, f"{figure.name}.png") for figure in figures])
    report = folder / "report.html"
    report.write_text(page(comparison, drawn), encoding="utf-8")
    yield report
