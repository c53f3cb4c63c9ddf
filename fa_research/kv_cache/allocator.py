"""Which pages are free: a free list on the host, and the number of owners of each page.

The idea is vLLM's block manager and SGLang's paged token allocator. A page with more than one owner is a full prefix
page; only a page with one owner is ever written. These counts are the only ones: whether a page can be evicted follows
from them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fa_research.errors import ConfigError, KVCacheFull

# Page numbers, type code "q". NumPy reads them without a copy; with pages of one slot there are as many as tokens.
Pages: TypeAlias = "array[int]"


def as_pages(numbers: NDArray[np.int64]) -> Pages:
    """A copy of these page numbers."""
    return array("q", numbers.tobytes())


class PagedAllocator:
    """Hands out pages 1..num_pages; page 0 is the null page, which padded entries write, and
    is never handed out.

    num_pages counts the pages that can be handed out. Nothing here touches the device.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ConfigError(f"kv.num_pages={num_pages}: must be at least 1")
        if not 1 <= page_size <= 256:
            raise ConfigError(f"kv.page_size={page_size}: must be from 1 to 256 slots")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = array("q", range(num_pages, 0, -1))
        self._references = np.zeros(num_pages + 1, np.int32)

    @property
    def pages_free(self) -> int:
        return len(self._free)

    @property
    def pages_used(self) -> int:
        return self.num_pages - len(self._free)

    def free_pages(self) -> tuple[int, ...]:
        """The free list, next page last."""
        return tuple(self._free)

    def references(self, page: int) -> int:
        """How many owners this page has."""
        return int(self._references[page])

    def references_of(self, pages: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
        """How many owners each of these pages has."""
        return self._references[np.asarray(pages, np.int64)]

    def pages_for(self, prefix_len: int, seq_len: int) -> int:
        """New pages for a request that grows from `prefix_len` to `seq_len` tokens: its partly filled last page is
        continued first."""
        assert 0 <= prefix_len <= seq_len
        return -(-seq_len // self.page_size) - -(-prefix_len // self.page_size)

    def alloc(self, count: int) -> Pages:
        """`count` pages with one owner each. Raises KVCacheFull, changing nothing, when fewer are free."""
        if count > len(self._free):
            raise KVCacheFull(requested=count, free=len(self._free))
        first = len(self._free) - count
        pages = self._free[first:][::-1]
        del self._free[first:]
        self._references[np.asarray(pages, np.int64)] = 1
        return pages

    def share(self, pages: Sequence[int] | NDArray[np.int64]) -> None:
        """One more owner for each of these pages, which are distinct and in use already."""
        numbers = np.asarray(pages, np.int64)
        counts = self.references_of(numbers)
        assert counts.all(), f"page {numbers[counts.argmin()]} is not in use"
        self._references[numbers] = counts + 1

    def free(self, pages: Sequence[int] | NDArray[np.int64]) -> Pages:
        """One owner fewer for each of these pages, which are distinct; those without an owner go back to the free list,
        and are returned."""
        numbers = np.asarray(pages, np.int64)
        counts = self.references_of(numbers)
        assert counts.all(), f"page {numbers[counts.argmin()]} is freed twice"
        self._references[numbers] = counts - 1
        freed = as_pages(numbers[counts == 1])
        self._free += freed
        return freed

    def churn(self, seed: int) -> None:
        """Leave the free list as long service does: in no order. Tables made from it are never `arange`, which would
        flatter a kernel that profits from neighbouring pages."""
        self._free = as_pages(np.random.default_rng(seed).permutation(self._free))

    def check(self) -> None:
        """The invariant: free + used = total, and no page is free twice or free and owned."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert 0 not in free and self._references[0] == 0, "the null page was handed out"
        used = set(self._references.nonzero()[0].tolist())
        assert not free & used, f"pages both free and used: {sorted(free & used)}"
        assert len(free) + len(used) == self.num_pages, "a page leaked"
