"""The face that every package of flash-attention kernels is given.

Legend: T query tokens, P pages, S slots in a page, H query heads, K KV heads, D head dim, V value head dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.metadata import FlashAttentionMetadata


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


class Provider:
    """One package. `version` is the flash-attention generation it is asked for (2 or 3)."""

    module: ClassVar[str]
    versions: ClassVar[frozenset[int]]
    sinks: ClassVar[frozenset[torch.dtype]] = frozenset()  # dtypes for which the kernel takes sinks
    chunk: ClassVar[bool] = False
    takes_out: ClassVar[bool] = False
    gathers: ClassVar[bool] = False  # whether it takes packed keys and values too
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
