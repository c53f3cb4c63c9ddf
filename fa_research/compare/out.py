"""The folder that `--out` names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fa_research.errors import ConfigError


def require_free(folder: Path) -> None:
    """Raises ConfigError for a file, and for a folder of results, whose own report and figures would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: give a folder")
    held = [
        file.name for pattern in ("rows*.jsonl", "multirun.yaml") for file in sorted(folder.glob(pattern))
    ]
    if held:
        raise ConfigError(
            f"--out {folder} holds results ({held[0]}), whose report.html and figures may be there: give another folder"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[list[Path]]:
    """Makes the folder and yields a list that the caller adds each file to once it is there. An error says what it has.

    Raises ConfigError that names `--out` for what `require_free` refuses and where nothing can be written.
    """
    require_free(folder)
    written: list[Path] = []
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield written
        except OSError as error:
            raise ConfigError(f"--out {error.filename or folder}: {error.strerror or error}") from error
    except ConfigError as error:
        if written:
            error.add_note(f"{folder} has {', '.join(path.name for path in written)} all the same")
        raise
