"""Pieces that the pages share: the frame, tables, listings, and what a row says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fa_research.compare.keys import text_of
from fa_research.compare.reading import Record
from fa_research.compare.style import style_sheet
from fa_research.compare.wording import counted

MOST_BYTES = 2_000_000
_FACTS = {
    "gpu": "GPU",
    "cpu": "CPU",
    "gpu_driver": "driver",
    "cuda": "CUDA",
    "python": "Python",
    "git_commit": "commit",
}


def frame(title: str, body: str) -> str:
    """A whole page that loads nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style_sheet()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[tuple[str, str]], lines: Iterable[str]) -> str:
    """A table of ready lines; `head` are texts with a class each."""
    columns = "".join(f'<th class="{kind}">{escape(text)}</th>' for text, kind in head)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def listing(values: Mapping[str, Any], exact: bool = False) -> str:
    """Keys and values, a line each; `exact` keeps every digit."""
    return "\n".join(f"{escape(key)}: {escape(str(v) if exact else text_of(v))}" for key, v in values.items())


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def machine(used: Sequence[Record], records: Sequence[Record]) -> str:
    """Where and when rows were made, and how many there are, in a line."""
    facts = []
    for key, name in _FACTS.items():
        values = sorted({str(v) for record in used if (v := record.row.environment.get(key)) is not None})
        if values and not (key == "cpu" and any(record.row.environment.get("gpu") for record in used)):
            facts.append(
                f"{name} {' and '.join(value[:12] if key == 'git_commit' else value for value in values)}"
            )
    for package in ("torch", "triton"):
        found = (record.row.environment.get("packages") or {} for record in used)
        if values := sorted({str(packages[package]) for packages in found if package in packages}):
            facts.append(f"{package} {' and '.join(values)}")
    days = sorted({record.row.finished[:10] for record in used})
    span = [days[0]] if len(days) == 1 else [f"{days[0]} to {days[-1]}"] if days else []
    return "; ".join([*facts, *span, counted(records)])
