"""Attention backends: one file each, found by name. `create` makes one, or says all that stands against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.backends.graph_state import CudaGraphState
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
    cls = _registry()[name]
    reasons = cls.unavailable(settings)
    if reasons:
        return (reasons,) if isinstance(reasons, str) else tuple(reasons)
    lowerings = dict.fromkeys(cls(settings, specs).lowerings)
    return tuple(dict.fromkeys(reason for lowering in lowerings for reason in lowering.reasons))


def choose(
    settings: BackendSettings,
    specs: Sequence[AttentionSpec],
    also: Callable[[str], Sequence[str]] = lambda name: (),
) -> tuple[str, str]:
    """`backend=auto`: the fastest backend for this device that supports every layer, and why it was taken. `also`: more
    reasons against a backend that could run them, of the caller's own."""
    ranked = sorted(_registry().values(), key=lambda cls: -cls.speed_rank(settings.device))
    passed_over: list[str] = []
    for cls in ranked:
        if cls.speed_rank(settings.device) < 0:
            continue
        reasons = _reasons_or_error(cls.name, settings, specs) or tuple(also(cls.name))
        if not reasons:
            because = "; ".join(passed_over) or "the first choice on this device"
            return cls.name, because
        passed_over.append(f"not {cls.name} ({', '.join(reasons)})")
    raise BackendUnavailable("auto", passed_over, ())


def create(name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> AttentionBackend:
    """Backend `name` for these layers. Raises ConfigError for an unknown name, BackendUnavailable where this machine
    cannot run it, Unsupported where it cannot do what the layers ask; both list every reason and what would work."""
    if name not in _registry():
        raise ConfigError(f"backend.name={name} is unknown; choose one of auto, {', '.join(names())}")
    reasons = reasons_against(name, settings, specs)
    if reasons:
        refusal = BackendUnavailable if _registry()[name].unavailable(settings) else Unsupported
        raise refusal(name, reasons, _alternatives(name, settings, specs))
    return _registry()[name](settings, specs)


def _alternatives(name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> tuple[str, ...]:
    # Provider, splits and options were meant for the backend that was asked for.
    neutral = replace(settings, provider=None, num_splits=0, options={})
    return tuple(other for other in names() if other != name and not _reasons_or_error(other, neutral, specs))


def _reasons_or_error(
    name: str, settings: BackendSettings, specs: Sequence[AttentionSpec]
) -> tuple[str, ...]:
    """The same of a backend that nobody asked for by name, where an error of its methods is a reason too."""
    try:
        return reasons_against(name, settings, specs)
    except Exception as error:
        return (f"it raised {type(error).__name__}: {error}",)
