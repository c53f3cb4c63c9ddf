"""A fingerprint of the code that makes a row: digests of this package and of plugins. It imports neither torch nor a
plugin.

A row is only worth what its code was. The digests tell rows of changed code apart where no commit does: files that are
not committed, plugins outside this repository. They are taken once in a process, before it imports what they cover, so
that a file which is edited while the process runs never lends its new digest to the old code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fa_research.discovery import plugins
from fa_research.fingerprint.plugin_files import PACKAGE, files_of_plugin, is_of_the_user

# Parts of the package that choose cells, keep rows and show them: what a cell measures does not depend on them.
NOT_MEASURING = frozenset({"cli", "compare", "fingerprint", "streams", "sweep", "tracking"})
_DIGITS = 12


def take() -> None:
    """Take the digests of the package and of all plugins now. A process calls it before it imports them."""
    fingerprint()


def fingerprint(used: Iterable[type] | None = None) -> dict[str, Any]:
    """The digests as plain data, hexadecimal.

    Args:
        used: the classes that made the row (backend, masks, workload): only plugin modules that they need are named.
            None: all modules of `FA_RESEARCH_PLUGINS`, and what they import.

    Returns:
        `package` (of all parts that measure), `parts` (each folder or file of the package at its top), and `plugins`
        (by module; left out where there is none).
    """
    parts = _package()
    names = plugins() if used is None else _modules_outside(used)
    found: dict[str, str] = {}
    for name in names:
        found |= _plugin(name)
    code = {
        "package": _digest(f"{part}:{digest}".encode() for part, digest in parts.items()),
        "parts": dict(parts),
    }
    return code | ({"plugins": dict(sorted(found.items()))} if found else {})


def changes(code: Mapping[str, Any]) -> list[str]:
    """What has changed since a row with this fingerprint was made, as names of files and folders; [] if nothing has."""
    parts, known = _package(), code.get("parts") or {}
    changed = [
        f"fa_research/{part}" for part in sorted({*parts, *known}) if parts.get(part) != known.get(part)
    ]
    for module, digest in (code.get("plugins") or {}).items():
        if _plugin(module).get(module) != digest:
            changed.append(f"{module.replace('.', '/')}.py")
    return changed


def _modules_outside(classes: Iterable[type]) -> list[str]:
    """Modules of these classes, and of those they derive from, that are plugins or modules of the user."""
    modules = dict.fromkeys(base.__module__ for cls in classes for base in cls.__mro__)
    return [name for name in modules if name in plugins() or is_of_the_user(name)]


@cache
def _package() -> dict[str, str]:
    """The digest of each measuring part of the package, by name."""
    parts = sorted(
        path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    )
    return {
        path.name: _digest_of_files(sorted(path.rglob("*.py")) if path.is_dir() else [path], PACKAGE)
        for path in parts
        if path.stem not in NOT_MEASURING
    }


@cache
def _plugin(name: str) -> dict[str, str]:
    """The digest of each module of a plugin, and of those of the user's modules that it imports."""
    return {
        module: _digest_of_files(files, files[0].parent) for module, files in files_of_plugin(name).items()
    }


def _digest_of_files(files: Iterable[Path], root: Path) -> str:
    return _digest(
        part for file in files for part in (f"\0{file.relative_to(root)}\0".encode(), _bytes_of(file))
    )


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it went between listing and reading
        return b""


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:_DIGITS]
