"""How masks, backends and workloads are found: by lying in their folder, or in a module that is named as a plugin."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from fa_research.errors import ConfigError

Base = TypeVar("Base")

PLUGINS = "FA_RESEARCH_PLUGINS"  # names of modules with masks, backends or workloads of one's own, with commas between


def plugins() -> tuple[str, ...]:
    """Modules that FA_RESEARCH_PLUGINS names; workers of a sweep find them where this process does."""
    return tuple(filter(None, (name.strip() for name in os.environ.get(PLUGINS, "").split(","))))


def is_plugin_file(filename: str) -> bool:
    """Whether a source file belongs to a plugin: to the outermost package that its module is in, or, where it is in
    none, to the module itself."""
    return any(_belongs(filename, plugin) for plugin in plugins())


def discover(
    package: str, base: type[Base], extra: Iterable[str] = (), reserved: Iterable[str] = ()
) -> dict[str, type[Base]]:
    """Every subclass of `base` that a module of `package`, or one of the modules `extra`, defines with a `name` of its
    own, by that name. Imports them all; classes defined elsewhere (in a test, a notebook) are no choice of the
    configuration.

    Raises ConfigError for a module of `extra` that cannot be imported, for a class that lacks a method, and for a name
    that two classes have, or that is `reserved`.
    """
    extra, kind = tuple(extra), package.rpartition(".")[2].removesuffix("s")
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for name in extra:
        _import_plugin(name)
    found: dict[str, type[Base]] = {}
    for cls in _subclasses(base):
        if "name" not in vars(cls) or not _is_of(cls, (package, *extra)) or _is_replaced(cls):
            continue
        name = vars(cls)["name"]
        if problem := _problem(cls, kind, found.get(name), name in reserved):
            origin = "" if _is_of(cls, [package]) else f"{PLUGINS}={','.join(extra)}: "
            raise ConfigError(f"{origin}{problem}")
        found[name] = cls
    return found


def _import_plugin(name: str) -> None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever somebody's module raises
        raise ConfigError(
            f"{PLUGINS}={name}: cannot be imported: {type(error).__name__}: {error}{_place(name, error)}; give modules "
            "on PYTHONPATH, with commas between"
        ) from error


def _place(plugin: str, error: BaseException) -> str:
    """Where the plugin's own code is wrong, if it is."""
    if isinstance(error, SyntaxError):
        return ""  # its message has file and line
    lines = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [f"{Path(file).name}:{line}" for file, line in lines if _belongs(file, plugin)]
    return f" ({own[-1]})" if own else ""


def _belongs(filename: str, plugin: str) -> bool:
    try:
        spec = importlib.util.find_spec(plugin.partition(".")[0])
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    path = Path(filename)
    return (
        any(path.is_relative_to(root) for root in spec.submodule_search_locations or ())
        or filename == spec.origin
    )


def _subclasses(base: type[Base]) -> Iterator[type[Base]]:
    """All of them, those of the package before those of plugins, which are imported later."""
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _is_of(cls: type, modules: Iterable[str]) -> bool:
    return any(cls.__module__ == module or cls.__module__.startswith(f"{module}.") for module in modules)


def _is_replaced(cls: type) -> bool:
    """Whether another class has taken its place in its module: `dataclass(slots=True)` makes one, and so does loading
    the module again."""
    now = vars(sys.modules[cls.__module__]).get(cls.__qualname__, cls)
    return now is not cls and inspect.isclass(now) and vars(now).get("name") == vars(cls)["name"]


def _problem(cls: type, kind: str, other: type | None, reserved: bool) -> str | None:
    """Why a class cannot be chosen by its name, in one line."""
    name, where = vars(cls)["name"], f"{cls.__module__}.{cls.__qualname__}"
    if not isinstance(name, str) or not name:
        return f"{kind} {where}: its name is {name!r}; give a text"
    if reserved:
        return f"{kind} {where}: the name {name} has a meaning of its own; give another name"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
        return f"{kind} {name} ({where}) lacks {missing}; write what ARCHITECTURE.md says of adding a {kind}"
    if other is not None:
        first = f"{other.__module__}.{other.__qualname__}"
        return f"two {kind}s have the name {name}, {first} and {where}; give one another name"
    return None
