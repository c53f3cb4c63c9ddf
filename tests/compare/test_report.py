"""The report: one file that needs nothing, whose links all lead somewhere; figures that are what they say."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path

import pytest

from fa_research.compare import Comparison, compare
from fa_research.compare.__main__ import main
from fa_research.compare.html import MOST_BYTES
from fa_research.compare.overview import read_sweep
from fa_research.compare.page import page
from fa_research.compare.sweep_page import sweep_page
from fa_research.tracking import ROWS_FILE, Status
from tests.compare.pages import Page
from tests.compare.results import config_of, noisy, row_of, sweep, write_rows

ROOT = Path(__file__).resolve().parents[2]
ALTAIR = pytest.importorskip("altair", reason="needs the extra report")
pytest.importorskip("vl_convert", reason="needs the extra report")

from fa_research.compare.figures import Figure, draw  # noqa: E402
from fa_research.compare.figures.costs import regret_figure  # noqa: E402
from fa_research.compare.figures.images import png, repacked, svg  # noqa: E402
from fa_research.compare.figures.lines import latency_figure  # noqa: E402
from fa_research.compare.figures.page_size import page_size_figure  # noqa: E402
from fa_research.compare.figures.theme import DARK, LIGHT, TONES, palette  # noqa: E402

TIMES = {
    (backend, context): base * context / 1024
    for backend, base in (("fa3", 100.0), ("triton", 112.0), ("torch", 700.0))
    for context in (1024, 4096, 16384)
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("results")
    for batch in (1, 8):
        for size in (1, 16):
            sweep(folder / f"{batch} {size}", TIMES, batch=batch, page=size)
    bad = row_of(config_of("fa2"), status=Status.unsupported)
    bad.reasons = ["<script>alert('no')</script> & more"]
    write_rows(folder / "bad" / ROWS_FILE, bad)
    for path in folder.rglob(ROWS_FILE):
        text = path.read_text().replace(
            '"decode_step_count"', '"decode_step_roof_fraction": 0.5, "decode_step_count"'
        )
        path.write_text(text)
    return compare([folder], "backend")


@pytest.fixture(scope="module")
def figures(comparison: Comparison) -> list[Figure]:
    return draw(comparison)


@pytest.fixture(scope="module")
def drawn(figures: list[Figure]) -> dict[str, str]:
    """SVGs by name."""
    return {figure.name: svg(figure) for figure in figures}


@pytest.fixture(scope="module")
def report(comparison: Comparison, drawn: dict[str, str]) -> str:
    return page(comparison, [(text, f"caption of {name}") for name, text in drawn.items()])


def test_it_loads_nothing_and_runs_nothing(report: str) -> None:
    found = Page(report)
    assert found.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert "@import" not in report
    assert "http://" not in report
    assert "https://" not in report
    assert not re.findall(r"url\((?!#)", report)


def test_every_link_leads_to_an_anchor_that_is_there_once(report: str, comparison: Comparison) -> None:
    found = Page(report)
    assert len(found.ids) == len(set(found.ids))
    assert {link for link in found.links if not link.startswith("#")} == set()
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert {f"row-{n}" for n in range(len(comparison.records))} <= set(found.ids)


def test_every_number_of_a_cell_links_to_the_row_it_is_of(report: str, comparison: Comparison) -> None:
    from fa_research.compare.names import number

    for cell in comparison.cells:
        for entry in cell.entries.values():
            text = entry.status if entry.estimate is None else number(entry.estimate.value)
            assert f'<a href="#row-{comparison.number_of(entry.record)}">{text}</a>' in report


def test_points_of_figures_are_links_with_words(comparison: Comparison, drawn: dict[str, str]) -> None:
    assert set(drawn) == {"latency", "cost", "roof", "decision", "regret", "page_size"}
    entries = [entry for cell in comparison.cells for entry in cell.entries.values()]
    rows = {comparison.number_of(entry.record) for entry in entries if entry.estimate is not None}
    for name in ("latency", "cost", "roof", "regret", "page_size"):
        assert {int(n) for n in re.findall(r'href="#row-(\d+)"', drawn[name])} == rows, name
        assert "<title>" in drawn[name]
    cells = {str(n) for n in range(len(comparison.cells))}
    assert set(re.findall(r'href="#cell-(\d+)"', drawn["decision"])) == cells


def test_figures_are_valid_vega_lite(figures: list[Figure]) -> None:
    for figure in figures:
        assert figure.chart.to_dict(validate=True)


def times(*contexts: int) -> dict[tuple[str, int], float]:
    return {(backend, context): 100.0 + context for backend in ("fa3", "triton") for context in contexts}


def test_no_line_is_drawn_across_a_row_without_a_number(tmp_path: Path) -> None:
    contexts = (1024, 2048, 3072, 4096, 5120)
    folder = sweep(tmp_path, times(*contexts))
    path = next(folder.glob(ROWS_FILE))
    rows = path.read_text().splitlines()
    gap = next(n for n, row in enumerate(rows) if '"name": "fa3"' in row and '"context_len": 3072' in row)
    rows[gap] = rows[gap].replace('"status": "ok"', '"status": "suspect"')
    path.write_text("\n".join(rows) + "\n")
    figure = latency_figure(compare([path], "backend"))
    assert figure is not None
    lines = re.findall(r'<path d="([^"]*L[^"]*)" stroke=', svg(figure))
    assert sorted(d.count("M") for d in lines) == [1, 2]


@pytest.mark.parametrize(("last", "kind"), [(2048, None), (131072, "log")])
def test_an_axis_is_logarithmic_where_numbers_differ_manyfold(
    tmp_path: Path, last: int, kind: str | None
) -> None:
    figure = latency_figure(compare([sweep(tmp_path, times(1024, last))], "backend"))
    assert figure is not None
    scales = re.findall(r"'field': 'y', 'scale': ({.*?})", str(figure.chart.to_dict()))
    assert scales
    assert all(("'log'" in scale) == (kind == "log") for scale in scales)


def test_lines_along_page_sizes_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for size in (1, 16):
        sweep(tmp_path / str(size), times(1024), page=size)
    figure = page_size_figure(compare([tmp_path], "kv.page_size"))
    assert figure is not None
    text = svg(figure)
    assert all(f">{word}</text>" in text for word in ("backend", "fa3", "triton"))


def test_what_rows_say_cannot_become_markup(report: str) -> None:
    assert "<script>" not in report
    assert "&lt;script&gt;alert(&#x27;no&#x27;)&lt;/script&gt; &amp; more" in report


def test_figures_have_the_pages_colours_and_no_others(drawn: dict[str, str], report: str) -> None:
    known = {f"var(--c{i})" for i in range(len(LIGHT))} | {f"var(--{name})" for name in TONES}
    for name, text in drawn.items():
        assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', text)) <= known | {"none", "transparent"}, name
    assert "prefers-color-scheme: dark" in report
    for number, color in enumerate(DARK):
        assert f"--c{number}: {color};" in report


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colors", "background", "tone"), [(LIGHT, "#ffffff", 0), (DARK, "#14171c", 1)])
def test_colours_stand_out_in_both_schemes(colors: tuple[str, ...], background: str, tone: int) -> None:
    # WCAG: 3 for graphical objects, 4.5 for text
    assert all(contrast(color, background) >= 3 for color in colors)
    assert contrast(TONES["fg"][tone], background) >= 4.5
    assert contrast(TONES["muted"][tone], background) >= 4.5


def test_answers_never_share_colour_and_shape() -> None:
    look = palette([str(n) for n in range(40)])
    assert len({(color, shape) for color, shape, _ in look.values()}) == 40


def test_pngs_are_whole(figures: list[Figure]) -> None:
    for figure in figures[:3]:
        data = png(figure)
        width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        at, pixels, kinds = 8, b"", []
        while at < len(data):
            (size,) = struct.unpack_from(">I", data, at)
            body = data[at + 4 : at + 8 + size]
            assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(body)
            kinds.append(body[:4])
            pixels += body[4:] if body[:4] == b"IDAT" else b""
            at += 12 + size
        assert kinds[0] == b"IHDR"
        assert kinds[-1] == b"IEND"
        channels = {2: 3, 6: 4}[kind]
        assert len(zlib.decompress(pixels)) == height * (1 + width * channels * depth // 8)
        assert repacked(data) == data


def test_a_thousand_rows_fit(tmp_path: Path) -> None:
    made = [config_of("fa3"), config_of("triton")]  # composing a thousand configs takes long
    rows = []
    for seed, config in enumerate(made):
        for context, batch, size in product(range(256, 8448, 256), (1, 2, 4, 8), (1, 16, 64, 128)):
            keys = {"context_len": context, "batch_size": batch}
            own = config | {"workload": config["workload"] | keys, "kv": config["kv"] | {"page_size": size}}
            rows.append(row_of(own, noisy(100.0 + context / 64, seed=seed)))
    assert len(rows) > 1000
    found = compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend")
    figures = [figure for make in (regret_figure, page_size_figure) if (figure := make(found))]
    assert len(figures) == 2  # those that draw every row; the others stop at some number of cells
    text = page(found, [(svg(figure), figure.caption) for figure in figures])
    assert len(text.encode()) < MOST_BYTES
    links = Page(text)
    assert {link[1:] for link in links.links} <= set(links.ids)
    sweep_ = read_sweep(tmp_path)
    whole = sweep_page(sweep_, [[(c, []) for c in [None, *part.asked]] for part in sweep_.parts])
    assert len(whole.encode()) < MOST_BYTES
    assert {f"row-{number}" for number in range(len(rows))} <= set(Page(whole).ids)


def test_the_command_writes_all_of_it(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "in", TIMES)
    assert main([str(folder), "-q", "backend", "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "report.html",
        "report.md",
        "cells.csv",
        "regret.csv",
        "latency.png",
        "cost.png",
        "decision.png",
    }
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", markdown)) == {
        name for name in names if name.endswith(".png")
    }


def test_one_cell_alone_has_a_report(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "in", {key: time for key, time in TIMES.items() if key[1] == 1024})
    assert main([str(folder), "-q", "backend", "--out", str(tmp_path / "out")]) == 0
    assert "cost.png" in {path.name for path in (tmp_path / "out").iterdir()}


WITHOUT = """
import sys
sys.modules["vl_convert"] = None
from fa_research.compare.__main__ import main
code = main(sys.argv[1:])
assert not {"torch", "triton", "wandb"} & set(sys.modules)
raise SystemExit(code)
"""


def test_without_the_extra_tables_are_written_and_the_extra_is_named(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "in", TIMES)
    command = [sys.executable, "-c", WITHOUT, str(folder), "-q", "backend", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert 'pip install -e ".[report]"' in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "cells.csv", "regret.csv"}
