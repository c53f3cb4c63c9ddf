"""How masks, backends and workloads are found: by lying in their folder."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

Base = TypeVar("Base")


def discover(package: str, base: type[Base]) -> dict[str, type[Base]]:
    """Every subclass of `base` that a module of `package` defines with a `name` of its own, by that name. Imports all
    modules of the package; classes defined elsewhere (in a test, a notebook) are no choice of the configuration."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    found: dict[str, type[Base]] = {}
    pending = base.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if "name" in vars(cls) and cls.__module__.startswith(f"{package}."):
            found[vars(cls)["name"]] = cls
    return found
