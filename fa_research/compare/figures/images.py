"""Figures as SVG for the page and as PNG for a README, by vl-convert: no browser, no network."""

from __future__ import annotations

import html
import re
import struct
import zlib
from functools import lru_cache
from typing import Any

from fa_research.compare.figures.base import Figure
from fa_research.compare.figures.theme import config, to_variables

_PNG_SCALE = 2.0
_LABELLED = r'(<a href="#[^"]*">)<path aria-label="([^"]*)"([^>]*)/>'
_PLACES = r' (?:transform|d|x2|y2|x|y|width|height)="[^"]*"'


def spec(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite specification with the theme. Altair's validation would take as long as the drawing."""
    chart: Any = figure.chart
    made: dict[str, Any] = chart.properties(title=figure.title).to_dict(validate=False)
    return made | {"config": config()}


@lru_cache(maxsize=1)  # a figure's PNG and SVG are made in succession, and drawing takes the longest
def _drawn(figure: Figure) -> str:
    import vl_convert

    return str(vl_convert.vegalite_to_svg(spec(figure)))


def png(figure: Figure, scale: float = _PNG_SCALE) -> bytes:
    """On white, at `scale` times the size of the page."""
    import vl_convert

    white = re.sub(
        r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', _drawn(figure), count=1
    )
    return repacked(vl_convert.svg_to_png(white, scale=scale))


def svg(figure: Figure) -> str:
    """To be put into a page: colours are the page's variables, links lead within it, names are the figure's own, and
    every point has a tooltip."""
    text = _drawn(figure)
    for color, variable in to_variables().items():
        text = re.sub(f'"{color}"', f'"{variable}"', text, flags=re.IGNORECASE)
    text = re.sub(r'xlink:href="[^"#]*#', 'href="#', text)
    text = re.sub(r'\bid="', f'id="{figure.name}-', text)
    text = re.sub(r"url\(#", f"url(#{figure.name}-", text)
    text = re.sub(
        r'(<a href="#[^"]*">)<path aria-label="([^"]*)"([^>]*)/>', r"\1<path\3><title>\2</title></path>", text
    )
    text = re.sub(r' (aria-label|aria-roledescription|role|aria-hidden|xmlns(:xlink)?)="[^"]*"', "", text)
    text = re.sub(r' (opacity="1"|pointer-events="none"|class="[^"]*")', "", text)
    text = re.sub(_PLACES, lambda place: re.sub(r"\.\d{2,}", lambda digits: digits[0][:2], place[0]), text)
    label = html.escape(f"{figure.title}. {figure.caption}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def repacked(data: bytes) -> bytes:
    """The same PNG with its pixels compressed well: vl-convert packs fast, not small."""
    head, chunks = data[:8], list(_chunks(data))
    pixels = zlib.compress(zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT")), 6)
    first = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    kept = [(kind, body) for kind, body in chunks if kind != b"IDAT"]
    kept.insert(first, (b"IDAT", pixels))
    return head + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in kept
    )


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found
