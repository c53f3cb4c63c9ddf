"""How masks, backends and workloads are found: by lying in their folder, or in a module that is named as a plugin."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

Base = TypeVar("Base")

PLUGINS = (
    "FA_RESEARCH_PLUGINS"  # names of modules with backends or workloads of one's own, with commas between
)


def plugins() -> tuple[str, ...]:
    """Modules that FA_RESEARCH_PLUGINS names; workers of a sweep find them where this process does."""
    return tuple(filter(None, (name.strip() for name in os.environ.get(PLUGINS, "").split(","))))


def discover(package: str, base: type[Base], extra: Iterable[str] = ()) -> dict[str, type[Base]]:
    """Every subclass of `base` that a module of `package`, or one of the modules `extra`, defines with a `name` of its
    own, by that name. Imports them all; classes defined elsewhere (in a test, a notebook) are no choice of the
    configuration. Raises ImportError for a module of `extra` that cannot be imported."""
    extra = tuple(extra)
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for name in extra:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{PLUGINS} names {name}, which cannot be imported: {error}") from error
    found: dict[str, type[Base]] = {}
    pending = base.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if "name" in vars(cls) and cls.__module__.startswith((f"{package}.", *extra)):
            found[vars(cls)["name"]] = cls
    return found
