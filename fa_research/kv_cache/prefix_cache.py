"""Prompts and answers that stay in the cache after their request has ended, so that later ones can share them.

The idea is SGLang's radix cache (Zheng et al., "SGLang", 2024): a radix tree whose edges are runs of whole pages. Here
it is one owner of pages among others. It counts nothing itself: the allocator says how many owners a page has, and a
page that the tree alone owns can be evicted.

Legend: S slots in a page.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fa_research.kv_cache.allocator import PagedAllocator, Pages, as_pages

Tokens = NDArray[np.int64]
Key = tuple[Hashable, bytes]


class _Node:
    """A run of whole pages below `parent`. Its key there is the salt and the bytes of its first page's tokens."""

    __slots__ = ("children", "key", "last_used", "pages", "parent", "tokens")

    def __init__(self, parent: _Node | None, key: Key, tokens: Tokens, pages: NDArray[np.int64]) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens  # S for each page
        self.pages = pages
        self.children: dict[Key, _Node] = {}
        self.last_used = 0


class PrefixCache:
    """A radix tree over whole pages, and an owner of the pages in it.

    Tokens are ids, int64 or a sequence of ints. A salt keeps apart what the ids alone do not tell: an image's hash, an
    adapter, a tenant. Prefixes with different salts never match. Nothing here touches the device.
    """

    def __init__(self, allocator: PagedAllocator) -> None:
        self._allocator = allocator
        self._page_size = allocator.page_size
        self._root = _Node(None, (None, b""), np.empty(0, np.int64), np.empty(0, np.int64))
        self._clock = 0  # of uses; the least recently used leaf has the smallest number
        self._leaves: list[
            tuple[int, int, _Node]
        ] = []  # heap by last use; stale entries are dropped when met
        self._pushes = count()
        self._nodes = 0

    def held_pages(self) -> Iterator[int]:
        """Every page in the tree."""
        for node in self._walk_all():
            yield from node.pages.tolist()

    def writable_pages(self) -> Sequence[int]:
        """None: what is in the tree is never written."""
        return ()

    def match(self, tokens: Sequence[int] | Tokens, salt: Hashable = None) -> Pages:
        """Pages of the longest known prefix of `tokens`, at most `len(tokens) - 1` tokens: the last one is always
        computed, because the next token follows from it. Changes nothing. The pages stay where they are only as long as
        nothing is evicted: give them to `PagedKVCache.open` before anything else."""
        tokens = np.asarray(tokens, np.int64)
        node, pages = self._root, array("q")
        end = max(0, len(tokens) - 1) // self._page_size
        while len(pages) < end:
            child, common = self._child(node, tokens[: end * self._page_size], len(pages), salt)
            if child is None:
                break
            pages += as_pages(child.pages[:common])
            if common < len(child.pages):
                break
            node = child
        return pages

    def insert(self, tokens: Sequence[int] | Tokens, pages: Sequence[int], salt: Hashable = None) -> None:
        """Own the whole pages of `tokens`, which lie in `pages` and are computed. Where the tree knows a prefix already
        it keeps its own pages; the caller's copy of them stays the caller's. What is inserted is used most recently."""
        tokens = np.asarray(tokens, np.int64)
        size = self._page_size
        end = min(len(tokens) // size, len(pages))
        tokens = tokens[: end * size]
        self._clock += 1
        node, done = self._root, 0
        while done < end:
            child, common = self._child(node, tokens, done, salt)
            if child is None:
                child, common = (
                    self._add(node, tokens[done * size :], np.array(pages[done:end], np.int64), salt),
                    end - done,
                )
            elif common < len(child.pages):
                child = self._split(child, common)
            child.last_used = self._clock
            node, done = child, done + common
        self._push_if_leaf(node)

    def evict(self, wanted: int, *, all_or_nothing: bool = False) -> Pages:
        """Give up `wanted` pages, or as many as can be freed; they become free, and are returned. Pages go one by one
        from the tail of the least recently used leaf, and only where no one else owns them. `all_or_nothing`: give up
        none where fewer than `wanted` can be freed."""
        plan = self._plan(wanted)
        if all_or_nothing and sum(pages for _, pages in plan) < wanted:
            return array("q")
        freed = array("q")
        for node, pages in plan:
            freed += self._cut(node, pages)
        return freed

    def clear(self) -> Pages:
        """Give up every page, also those that others own; returns those that became free."""
        pages = array("q", self.held_pages())
        self._root.children.clear()
        self._leaves.clear()
        self._nodes = 0
        return self._allocator.free(pages)

    def check(self) -> None:
        """The tree's own invariants: whole pages, keys that fit, parents used no earlier than their children, and every
        leaf known to the eviction."""
        leaves = {id(node) for used, _, node in self._leaves if used == node.last_used}
        nodes = list(self._walk_all())
        assert len(nodes) == self._nodes
        for node in nodes:
            assert len(node.pages) and len(node.tokens) == len(node.pages) * self._page_size
            assert node.key[1] == node.tokens[: self._page_size].tobytes()
            assert node.parent is not None and node.parent.children[node.key] is node
            assert node.parent is self._root or node.parent.last_used >= node.last_used
            assert node.children or id(node) in leaves, "a leaf that can never be evicted"

    def _walk_all(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def _child(self, node: _Node, tokens: Tokens, done: int, salt: Hashable) -> tuple[_Node | None, int]:
        """The child of `node` that goes on like page `done` of `tokens`, and how many pages they have in common."""
        size = self._page_size
        rest = tokens[done * size :]
        child = node.children.get((salt, rest[:size].tobytes()))
        if child is None:
            return None, 0
        length = min(len(child.tokens), len(rest))
        equal = child.tokens[:length] == rest[:length]
        return child, (length if equal.all() else int(equal.argmin())) // size

    def _add(self, parent: _Node, tokens: Tokens, pages: NDArray[np.int64], salt: Hashable) -> _Node:
        node = _Node(parent, (salt, tokens[: self._page_size].tobytes()), tokens.copy(), pages)
        parent.children[node.key] = node
        self._allocator.share(pages)
        self._nodes += 1
        return node

    def _split(self, node: _Node, pages: int) -> _Node:
        """Cut the run after `pages` pages; returns the new node of its front. `node` keeps the tail and the children,
        and so its place among the leaves."""
        size = self._page_size
        assert node.parent is not None
        front = _Node(node.parent, node.key, node.tokens[: pages * size], node.pages[:pages])
        front.last_used = node.last_used
        node.parent.children[node.key] = front
        node.parent, node.tokens, node.pages = front, node.tokens[pages * size :], node.pages[pages:]
        node.key = (node.key[0], node.tokens[:size].tobytes())
        front.children[node.key] = node
        self._nodes += 1
        return front

    def _cut(self, node: _Node, pages: int) -> Pages:
        """Free the last pages of a leaf, and the leaf itself with its last one; `_plan` has entered its parent among
        the leaves by then."""
        keep = len(node.pages) - pages
        gone, node.pages = node.pages[keep:], node.pages[:keep]
        node.tokens = node.tokens[: keep * self._page_size]
        if not keep:
            assert node.parent is not None
            del node.parent.children[node.key]
            self._nodes -= 1
        return self._allocator.free(gone)

    def _plan(self, wanted: int) -> list[tuple[_Node, int]]:
        """Leaves in the order of eviction and how many pages of each; changes nothing. Only leaves are looked at: those
        that go, and those used less recently that someone still needs."""
        plan: dict[_Node, int] = {}
        emptied: Counter[_Node] = Counter()  # children that the plan removes
        seen: list[tuple[int, int, _Node]] = []
        while wanted > 0 and self._leaves:
            entry = heappop(self._leaves)
            used, _, node = entry
            stale = used != node.last_used or not len(node.pages)  # used again since, or gone
            if stale or node in plan or len(node.children) > emptied[node]:
                continue
            seen.append(entry)
            pages = self._free_tail(node, wanted)
            if pages:
                plan[node] = pages
                wanted -= pages
            if pages == len(node.pages) and node.parent is not None:
                emptied[node.parent] += 1
                if node.parent is not self._root:
                    heappush(self._leaves, (node.parent.last_used, next(self._pushes), node.parent))
        for entry in seen:
            heappush(self._leaves, entry)
        return list(plan.items())

    def _free_tail(self, node: _Node, wanted: int) -> int:
        """How many pages at the end of a run, `wanted` at most, have no owner but the tree."""
        if self._allocator.references(node.pages[-1]) != 1:  # most often the run of a live request
            return 0
        shared = self._allocator.references_of(node.pages[-wanted:][::-1]) > 1
        return int(shared.argmax()) if shared.any() else len(shared)

    def _push_if_leaf(self, node: _Node) -> None:
        if node.children or node is self._root:
            return
        heappush(self._leaves, (node.last_used, next(self._pushes), node))
        if len(self._leaves) > 2 * self._nodes + 64:  # mostly leaves that were used again since
            newest = {leaf: entry for entry in self._leaves if (leaf := entry[2]).last_used == entry[0]}
            self._leaves = [entry for leaf, entry in newest.items() if len(leaf.pages) and not leaf.children]
            heapify(self._leaves)
