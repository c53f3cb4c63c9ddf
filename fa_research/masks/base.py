"""What a mask is: a predicate over positions, and the band form that kernels understand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Band:
    """A mask as one interval of keys per query, in the terms kernels take (0 = absent).

    causal: keys up to the query. window: at most `window` keys, the query's own included.
    chunk: keys from the start of the query's chunk of `chunk` tokens.
    """

    causal: bool
    window: int = 0
    chunk: int = 0

    @property
    def features(self) -> frozenset[str]:
        """The kernel features that this band needs, as named in `Capabilities.mask_features`."""
        wanted = {"causal" if self.causal else "full"}
        wanted |= {name for name, size in (("window", self.window), ("chunk", self.chunk)) if size}
        return frozenset(wanted)


class Mask(ABC):
    """Which keys a query may see. Subclasses are frozen dataclasses, so a spec that holds one is hashable."""

    __slots__ = ()
    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        """True where the query at position `q_pos` sees the key at `k_pos` (ints, or integer tensors that
        broadcast)."""

    @abstractmethod
    def band(self) -> Band | None:
        """The same as a band, or None where no band says it (then only predicate backends can serve it)."""
