"""The face that every package of flash-attention kernels is given.

Legend: T query tokens, P pages, S slots in a page, H query heads, K KV heads, D head dim, V value head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class KernelArguments:
    """One call's numbers: window is (left, right) with -1 for none; chunk and softcap 0 for none. With `gathered`, keys
    and values are [tokens, K, D], packed as `cu_seqlens_k_B1` says, and there is no page table."""

    scale: float
    causal: bool
    window: tuple[int, int]
    chunk: int
    softcap: float
    num_splits: int
    return_lse: bool
    gathered: bool = False
    out: Tensor | None = None  # where the output goes, for a provider that takes it


@dataclass(frozen=True, slots=True)
class WindowFault:
    """Sliding windows for which a build of FA3 computes extend passes wrongly, as a scan found it
    (experiments/fa3_windows).

    The kernel reads the keys of a query tile in key tiles, which it counts from the first key that the tile's first
    query sees. Only the last key tile gets the causal mask. Where the queries of the tile end in more than one key
    tile, the first of them see keys after themselves. Decode steps, whose tile has one query, are right.

    tiles: head dim -> (rows of a query tile, keys of a key tile). Other head dims are right. A query tile holds its
    rows for all query heads of a KV head."""

    tiles: Mapping[int, tuple[int, int]]

    def affects(self, head_dim: int, group: int, window: int) -> bool:
        """Whether some extend pass is wrong; `group` query heads share a KV head, `window` keys (0: no window)."""
        if not window or head_dim not in self.tiles:
            return False
        rows, keys = self.tiles[head_dim]
        queries = rows // group if rows % group == 0 else -(-(rows - 1) // group) + 1
        return window + queries - 2 >= 2 * keys and window % keys + queries >= keys + 2


class Provider:
    """One package. `version` is the flash-attention generation it is asked for (2 or 3)."""

    module: ClassVar[str]
    versions: ClassVar[frozenset[int]]
    sinks: ClassVar[frozenset[torch.dtype]] = frozenset()  # dtypes for which the kernel takes sinks
    chunk: ClassVar[bool] = False
    takes_out: ClassVar[bool] = False
    gathers: ClassVar[bool] = False  # whether it takes packed keys and values too
    window_fault: ClassVar[WindowFault | None] = None  # of its FA3
    page_size_multiple: ClassVar[dict[int, int]] = {2: 256, 3: 1}

    def __init__(self, version: int) -> None:
        self.version = version
        self._module = self._load()

    @classmethod
    def missing(cls, version: int) -> str | None:
        """Why this package cannot provide generation `version` here, or None. Tries the import."""
        if version not in cls.versions:
            return f"{cls.module} has no FA{version}"
        try:
            cls(version)
        except Exception as error:  # a broken binary raises ImportError, OSError, RuntimeError or worse
            return f"{cls.module}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return None

    def _load(self) -> Any:
        return importlib.import_module(self.module)

    def split_reasons(self, num_splits: int, deterministic: bool) -> tuple[str, ...]:
        """Why `backend.num_splits` or `backend.deterministic` cannot be had from this package; empty if they can."""
        return ()

    def window_reasons(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Why the mask of `spec` cannot be had from this package, although its kernels have windows."""
        band, group = spec.mask.band(), spec.num_heads // spec.num_kv_heads
        if self.version != 3 or self.window_fault is None or band is None:
            return ()
        if not self.window_fault.affects(spec.head_dim, group, band.window):
            return ()
        return (
            f"mask {spec.mask.name} of {band.window} tokens: FA3 of {self.module} computes extend passes wrongly for "
            f"this window at head dim {spec.head_dim} with {group} query heads per KV head (experiments/fa3_windows)",
        )

    def schedule(
        self, metadata: FlashAttentionMetadata, page_size: int | None, **shape: Any
    ) -> Tensor | None:
        """FA3's tile scheduler metadata for this pass, or None where the package takes none. `page_size` None: keys
        are packed."""
        return None

    def call(
        self,
        q_THD: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: FlashAttentionMetadata,
        args: KernelArguments,
        schedule: Tensor | None,
        sinks_H: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, H, V], LSE [T, H] or None). K and V are pages, [P, S, K, D], or packed."""
        raise NotImplementedError
