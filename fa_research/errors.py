"""The errors a user can cause. Each message names the key, what was given and what would work.

Everything else that goes wrong is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class FaResearchError(ValueError):
    """Root of all user-facing errors; the command line prints its message without a traceback."""


class ConfigError(FaResearchError):
    """A configuration value, or a combination of values, that cannot work."""


class CheckpointError(FaResearchError):
    """The weights in the folder `model.path` cannot be loaded."""


class InteropError(FaResearchError):
    """A tensor cannot be shared between torch and JAX without a copy, or JAX cannot run beside this torch."""


class TimingError(FaResearchError):
    """The clocks of this machine do not time what is known: no time would mean anything."""


class Refusal(FaResearchError):
    """A backend said no.

    Attributes:
        name: the backend that was asked for.
        reasons: every reason, not only the first one found.
        alternatives: names of the backends that would work here.
    """

    verb = "cannot be used"

    def __init__(self, name: str, reasons: Sequence[str], alternatives: Sequence[str] = ()) -> None:
        # All three go to Exception.args so that the error survives pickling by process-based launchers.
        super().__init__(name, tuple(reasons), tuple(alternatives))
        self.name = name
        self.reasons: tuple[str, ...] = tuple(reasons)
        self.alternatives: tuple[str, ...] = tuple(alternatives)

    def __str__(self) -> str:
        would_work = ", ".join(self.alternatives) or "none"
        reasons = "; ".join(self.reasons)
        return f"backend={self.name} {self.verb}: {reasons}. Backends that would work here: {would_work}"


class BackendUnavailable(Refusal):
    """The backend is unknown, not installed, or this machine cannot run it."""

    verb = "is not available here"


class Unsupported(Refusal):
    """The backend runs here but not with this combination of shapes, masks, page size or dtype."""

    verb = "does not support this combination"


def _pages(count: int) -> str:
    return f"{count} page" if count == 1 else f"{count} pages"


class BackendFault(FaResearchError):
    """A backend broke its contract: its class lacks something, or `attend` returned what no backend may return."""


class KVCacheFull(FaResearchError):
    """The KV cache has too few free pages; the allocator has changed nothing.

    Attributes:
        requested: pages asked for.
        free: pages free at that moment.
    """

    def __init__(self, requested: int, free: int) -> None:
        super().__init__(requested, free)
        self.requested = requested
        self.free = free

    def __str__(self) -> str:
        return (
            f"KV cache full: {self.requested} pages requested, {self.free} pages free; "
            "raise kv.num_pages or kv.memory_fraction, or ask for fewer or shorter requests"
        )


class DoesNotFit(FaResearchError):
    """The cell needs more memory than there is; nothing was built."""


class CacheError(FaResearchError):
    """A call on the KV cache that would break its bookkeeping; nothing has changed."""


class CellLost(FaResearchError):
    """The process that ran a cell of a sweep ended, or was ended, before the cell was done.

    Attributes:
        reasons: what happened, and the process's last words.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(tuple(reasons))
        self.reasons: tuple[str, ...] = tuple(reasons)

    def __str__(self) -> str:
        return "; ".join(self.reasons)
