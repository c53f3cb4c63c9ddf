"""How masks, backends and workloads are found: by lying in their folder, or in a module that is named as a plugin."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from typing import TypeVar

from fa_research.errors import ConfigError

Base = TypeVar("Base")

PLUGINS = (
    "FA_RESEARCH_PLUGINS"  # names of modules with backends or workloads of one's own, with commas between
)


def plugins() -> tuple[str, ...]:
    """Modules that FA_RESEARCH_PLUGINS names; workers of a sweep find them where this process does."""
    return tuple(filter(None, (name.strip() for name in os.environ.get(PLUGINS, "").split(","))))


# In a process of their own: one that only launches cells imports no torch.
_CHECK = (
    "import sys; sys.path[:] = sys.argv[1:]; from fa_research import discovery; sys.exit(discovery.problem())"
)


def check_plugins() -> None:
    """Raises ConfigError for a plugin that cannot be imported; imports nothing into this process."""
    if not plugins():
        return
    done = subprocess.run([sys.executable, "-c", _CHECK, *sys.path], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended its process"]
        ours = [line for line in lines if line.startswith(PLUGINS)]  # others may speak at its end
        raise ConfigError([f"{PLUGINS}={','.join(plugins())}: cannot be imported: {lines[-1]}", *ours][-1])


def problem() -> str | None:
    """What is wrong with the plugins, on one line."""
    try:
        for name in plugins():
            _import_plugin(name)
    except ConfigError as error:
        return " ".join(str(error).split())
    return None


def _import_plugin(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever somebody's module raises
        raise ConfigError(
            f"{PLUGINS}={name}: cannot be imported: {type(error).__name__}: {error}; give modules on PYTHONPATH, with "
            "commas between"
        ) from error


def discover(package: str, base: type[Base], extra: Iterable[str] = ()) -> dict[str, type[Base]]:
    """Every subclass of `base` that a module of `package`, or one of the modules `extra`, defines with a `name` of its
    own, by that name. Imports them all; classes defined elsewhere (in a test, a notebook) are no choice of the
    configuration. Raises ConfigError for a module of `extra` that cannot be imported."""
    extra = tuple(extra)
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for name in extra:
        _import_plugin(name)
    found: dict[str, type[Base]] = {}
    pending = base.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if "name" in vars(cls) and cls.__module__.startswith((f"{package}.", *extra)):
            found[vars(cls)["name"]] = cls
    return found
