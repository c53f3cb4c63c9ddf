"""The source files of a plugin: its own module, and the modules of the user that it imports, found without running any.

A plugin's file often imports another one beside it (`import my_kernels`), and its CUDA sources lie in the same folder.
Both are part of the code that a row was made with. Modules of Python itself, of installed packages and of fa_research
are left out: the first two have versions, and the last a digest of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import site
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_NATIVE = frozenset(
    {".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp", ".ptx"}
)  # sources that Python code compiles
_INSTALLED = tuple(
    Path(folder).resolve()
    for folder in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


def files_of_plugin(name: str) -> dict[str, list[Path]]:
    """Files by module: those of the module `name`, then those of every module of the user that it imports, directly or
    not. {} where there is no such module.

    Imports are read from the source text, so one that is only computed at run time is not found.
    """
    found: dict[str, list[Path]] = {}
    pending = [name]
    while pending:
        module = pending.pop()
        path = None if module in found else _source(module)
        if path is None or not (_top(module) == _top(name) or is_of_the_user(module)):
            continue
        found[module] = [path, *_native_sources(path.parent)]
        pending += _imports(path, module)
    return found


def _source(module: str) -> Path | None:
    """The file of a module (its `__init__.py` where it is a package), None where it has none. Runs no code of it."""
    spec = _spec(module)
    return Path(spec.origin).resolve() if spec is not None and spec.has_location and spec.origin else None


def _spec(module: str) -> ModuleSpec | None:
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for depth in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            full = ".".join([top, *rest[: depth + 1]])
            spec = PathFinder.find_spec(full, list(spec.submodule_search_locations))
    except (
        ImportError,
        ValueError,
        AttributeError,
    ):  # ValueError: a module that was made by hand has no spec
        return None
    return spec


def is_of_the_user(module: str) -> bool:
    """Whether a module has a file that is neither part of fa_research or Python nor of an installed package."""
    top = _source(_top(module)) or _source(module)
    if top is None or any(top.is_relative_to(folder) for folder in (PACKAGE, *_INSTALLED)):
        return False
    return not _is_for_installed(top.parent.parent if top.name == "__init__.py" else top.parent)


@cache
def _is_for_installed(folder: Path) -> bool:
    """Whether pip has installed packages into a folder, as with --target."""
    return any(folder.glob("*.dist-info"))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _native_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _NATIVE and path.is_file())


def _imports(path: Path, module: str) -> Iterator[str]:
    """Names of modules that a file may import; `from a import b` gives a and a.b, of which one may be no module."""
    yield from (module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1))  # packages around it
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # ValueError: not Python, such as a compiled extension
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parts, node.module]))
            if base:
                yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names if alias.name != "*")
