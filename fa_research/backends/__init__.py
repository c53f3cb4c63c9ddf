"""Attention backends: one file each, found by name. `create` makes one, or says all that stands against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.backends.graph_state import CudaGraphState
from fa_research.backends.preference import preference
from fa_research.discovery import discover, plugins
from fa_research.errors import BackendUnavailable, ConfigError, Unsupported
from fa_research.spec import AttentionSpec

__all__ = [
    "AttentionBackend",
    "BackendSettings",
    "CudaGraphState",
    "choose",
    "create",
    "names",
    "reasons_against",
]


@cache
def _registry() -> dict[str, type[AttentionBackend]]:
    return discover(__name__, AttentionBackend, plugins(), reserved=["auto"])  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """All backends, whether or not they run here."""
    return tuple(sorted(_registry()))


def reasons_against(name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> tuple[str, ...]:
    """Every reason why backend `name` cannot serve these specs here; empty if it can. Raises what its methods raise."""
    return _try(_registry()[name], settings, specs)[1]


def choose(
    settings: BackendSettings,
    specs: Sequence[AttentionSpec],
    also: Callable[[AttentionBackend], Sequence[str]] = lambda backend: (),
) -> tuple[AttentionBackend, str]:
    """`backend=auto`: the first backend of the measured order for this device that supports every layer, and why it
    was taken. `also`: more reasons against a backend that could run them, of the caller's own. Raises
    BackendUnavailable where none can."""
    preferred = preference(settings.device)
    passed_over: list[str] = []
    for name in preferred.order:
        backend, reasons = _try_or_error(_registry()[name], settings, specs)
        if backend is not None and not reasons:
            reasons = tuple(also(backend))
        if backend is not None and not reasons:
            return backend, "; ".join([*passed_over, preferred.reason])
        passed_over.append(f"not {name} ({', '.join(reasons)})")
    raise BackendUnavailable("auto", passed_over, ())


def create(name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> AttentionBackend:
    """Backend `name` for these layers. Raises ConfigError for an unknown name, BackendUnavailable where this machine
    cannot run it, Unsupported where it cannot do what the layers ask; both list every reason and what would work."""
    if name not in _registry():
        raise ConfigError(f"backend.name={name} is unknown; choose one of auto, {', '.join(names())}")
    backend, reasons = _try(_registry()[name], settings, specs)
    if backend is None or reasons:
        refusal = BackendUnavailable if backend is None else Unsupported
        raise refusal(name, reasons, _alternatives(name, settings, specs))
    return backend


def _try(
    cls: type[AttentionBackend], settings: BackendSettings, specs: Sequence[AttentionSpec]
) -> tuple[AttentionBackend | None, tuple[str, ...]]:
    """The backend (None where this machine cannot run it) and all reasons against it."""
    reasons = cls.unavailable(settings)
    if reasons:
        return None, (reasons,) if isinstance(reasons, str) else tuple(reasons)
    backend = cls(settings, specs)
    lowerings = dict.fromkeys(backend.lowerings)
    return backend, tuple(dict.fromkeys(reason for lowering in lowerings for reason in lowering.reasons))


def _alternatives(name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> tuple[str, ...]:
    # Provider, splits and options were meant for the backend that was asked for.
    neutral = replace(settings, provider=None, num_splits=0, options={})
    others = ((other, cls) for other, cls in sorted(_registry().items()) if other != name)
    return tuple(other for other, cls in others if not _try_or_error(cls, neutral, specs)[1])


def _try_or_error(
    cls: type[AttentionBackend], settings: BackendSettings, specs: Sequence[AttentionSpec]
) -> tuple[AttentionBackend | None, tuple[str, ...]]:
    """The same of a backend that nobody asked for by name, where an error of its methods is a reason too."""
    try:
        return _try(cls, settings, specs)
    except Exception as error:
        return None, (f"it raised {type(error).__name__}: {error}",)
