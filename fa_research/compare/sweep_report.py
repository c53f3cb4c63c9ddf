"""The report at the end of a sweep: report.html and PNGs in its folder, from its rows alone."""

from __future__ import annotations

from pathlib import Path

from fa_research.compare.comparison import Comparison
from fa_research.compare.overview import Sweep, read_sweep
from fa_research.compare.sweep_page import Drawn, sweep_page
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE

REPORT_FILE = "report.html"
_SCALE = 1.5  # of PNGs; every sweep waits for them


def write(sweep_dir: Path) -> list[Path]:
    """Report on all rows below `sweep_dir`; returns the files written, the page first.

    Without the extra `report` the page has no figures, and a line on the screen says what to install.

    Raises ConfigError if there is no row, OSError if the folder cannot be written to.
    """
    sweep = read_sweep(sweep_dir)
    try:
        drawn: Drawn
        drawn, images = _draw(sweep, sweep_dir)
    except ConfigError as error:
        CONSOLE.print(f"{REPORT_FILE} has no figures: {error}", soft_wrap=True, markup=False)
        drawn, images = [[(c, []) for c in [None, *part.asked]] for part in sweep.parts], []
    page = sweep_dir / REPORT_FILE
    page.write_text(sweep_page(sweep, drawn), encoding="utf-8")
    return [page, *images]


def _draw(sweep: Sweep, folder: Path) -> tuple[Drawn, list[Path]]:
    from fa_research.compare.figures import require_altair

    require_altair()
    from fa_research.compare.figures.images import png, svg
    from fa_research.compare.sweep_figures import sections

    drawn: list[list[tuple[Comparison | None, list[tuple[str, str]]]]] = []
    images: list[Path] = []
    for part in sections(sweep):
        drawn.append([])
        for comparison, figures in part:
            texts = []
            for figure in figures:
                images.append(folder / f"{figure.name}.png")
                images[-1].write_bytes(png(figure, _SCALE))
                texts.append((svg(figure), figure.caption))
            drawn[-1].append((comparison, texts))
    return drawn, images
