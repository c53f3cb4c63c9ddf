"""All files of a comparison."""

from __future__ import annotations

from pathlib import Path

from fa_research.compare.comparison import Comparison
from fa_research.compare.files import write_csv, write_markdown
from fa_research.tracking import CONSOLE


def write_report(comparison: Comparison, folder: Path) -> None:
    """CSV and Markdown into `folder`, which is made where it is missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [*write_csv(comparison, folder), write_markdown(comparison, folder)]
    CONSOLE.print(f"wrote {', '.join(path.name for path in written)} to {folder}", soft_wrap=True)
