"""Which pages are free: a free list on the host, and the number of owners of each page.

The idea is vLLM's block manager and SGLang's paged token allocator. A page with more than one owner is a full prefix
page; only a page with one owner is ever written. These counts are the only ones: whether a page can be evicted follows
from them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fa_research.errors import KVCacheFull


class PagedAllocator:
    """Hands out pages 1..num_pages; page 0 is the null page, which padded entries write, and
    is never handed out.

    num_pages counts the pages that can be handed out. Nothing here touches the device.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"kv.num_pages={num_pages} must be at least 1")
        if not 1 <= page_size <= 256:
            raise ValueError(f"kv.page_size={page_size} must be from 1 to 256 slots")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._references = [0] * (num_pages + 1)

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
        return self._references[page]

    def pages_for(self, prefix_len: int, seq_len: int) -> int:
        """New pages for a request that grows from `prefix_len` to `seq_len` tokens: its partly filled last page is
        continued first."""
        assert 0 <= prefix_len <= seq_len
        return -(-seq_len // self.page_size) - -(-prefix_len // self.page_size)

    def alloc(self, count: int) -> list[int]:
        """`count` pages with one owner each. Raises KVCacheFull, changing nothing, when fewer are free."""
        if count > len(self._free):
            raise KVCacheFull(requested=count, free=len(self._free))
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of these pages, which are in use already."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is not in use"
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """One owner fewer for each page; those without an owner go back to the free list, and are returned."""
        freed = []
        references = self._references
        for page in pages:  # once for every token where a page is one slot
            count = references[page]
            assert count > 0, f"page {page} is freed twice"
            references[page] = count - 1
            if count == 1:
                freed.append(page)
        self._free += freed
        return freed

    def churn(self, seed: int) -> None:
        """Leave the free list as long service does: in no order. Tables made from it are never `arange`, which would
        flatter a kernel that profits from neighbouring pages."""
        self._free = np.random.default_rng(seed).permutation(self._free).tolist()

    def check(self) -> None:
        """The invariant: free + used = total, and no page is free twice or free and owned."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert 0 not in free and self._references[0] == 0, "the null page was handed out"
        used = {page for page, count in enumerate(self._references) if count > 0}
        assert not free & used, f"pages both free and used: {sorted(free & used)}"
        assert len(free) + len(used) == self.num_pages, "a page leaked"
