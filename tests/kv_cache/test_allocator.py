"""Pages: what fits is admitted, what does not changes nothing, and none is lost or given twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fa_research.errors import KVCacheFull
from fa_research.kv_cache import PagedAllocator
from fa_research.kv_cache.allocator import Pages
from tests.helpers import examples
from tests.kv_cache.states import allocator_state


@examples(60)
@given(st.data())
def test_long_random_runs(data: st.DataObject) -> None:
    """Owners take, share and give back pages in any order; a count beside the allocator knows who holds what."""
    total = data.draw(st.integers(1, 12), "pages")
    allocator = PagedAllocator(total, data.draw(st.integers(1, 256), "page size"))
    owners: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30), "steps")):
        step = data.draw(st.sampled_from(["alloc", "share", "free", "churn"]))
        before = allocator_state(allocator)
        held = {page for pages in owners for page in pages}
        if step == "alloc":
            count = data.draw(st.integers(0, total + 2))
            if count > total - len(held):
                with pytest.raises(KVCacheFull) as error:
                    allocator.alloc(count)
                assert (error.value.requested, error.value.free) == (count, total - len(held))
                assert allocator_state(allocator) == before
            else:
                pages = allocator.alloc(count)
                assert (
                    len(set(pages)) == count
                    and not held & set(pages)
                    and set(pages) <= set(range(1, total + 1))
                )
                owners.append(pages)
        elif step == "share" and owners:
            pages = data.draw(st.sampled_from(owners))
            allocator.share(pages)
            owners.append(list(pages))
        elif step == "free" and owners:
            allocator.free(owners.pop(data.draw(st.integers(0, len(owners) - 1))))
        elif step == "churn":
            allocator.churn(data.draw(st.integers(0, 99)))
            assert allocator_state(allocator) == before
        check(allocator, owners)


def check(allocator: PagedAllocator, owners: list[list[int]]) -> None:
    allocator.check()
    everything = [page for pages in owners for page in pages]
    assert allocator.pages_used == len(set(everything))
    assert allocator.pages_free + allocator.pages_used == allocator.num_pages
    for page in range(allocator.num_pages + 1):
        assert allocator.references(page) == everything.count(page)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@given(prefix=st.integers(0, 700), new=st.integers(0, 700))
@examples(50)
def test_pages_for_counts_the_page_borders_that_are_crossed(page_size: int, prefix: int, new: int) -> None:
    """The partly filled last page is continued first: one page for each token that begins one."""
    allocator = PagedAllocator(1, page_size)
    assert allocator.pages_for(prefix, prefix + new) == sum(
        j % page_size == 0 for j in range(prefix, prefix + new)
    )


def test_page_0_is_never_handed_out() -> None:
    allocator = PagedAllocator(7, 4)
    allocator.churn(3)
    assert sorted(allocator.alloc(7)) == [1, 2, 3, 4, 5, 6, 7]


def test_the_error_says_what_was_asked_and_what_is_free() -> None:
    allocator = PagedAllocator(5, 16)
    allocator.alloc(2)
    with pytest.raises(KVCacheFull, match=r"4 pages requested, 3 pages free.*kv\.num_pages"):
        allocator.alloc(4)


def test_the_last_page_can_be_had() -> None:
    allocator = PagedAllocator(3, 4)
    assert len(allocator.alloc(2)) == 2 and len(allocator.alloc(1)) == 1 and allocator.pages_free == 0
    assert not allocator.alloc(0)
    with pytest.raises(KVCacheFull):
        allocator.alloc(1)


def test_a_shared_page_is_free_when_its_last_owner_leaves() -> None:
    allocator = PagedAllocator(2, 4)
    pages = allocator.alloc(1)
    allocator.share(pages)
    assert not allocator.free(pages) and allocator.pages_used == 1
    assert allocator.free(pages) == pages and allocator.pages_used == 0


def test_misuse_is_caught() -> None:
    allocator = PagedAllocator(2, 4)
    pages = allocator.alloc(1)
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)
    with pytest.raises(AssertionError, match="not in use"):
        allocator.share(pages)


@pytest.mark.parametrize("damage", ["free twice", "leak", "both", "sink"])
def test_check_sees_each_kind_of_damage(damage: str) -> None:
    allocator = PagedAllocator(4, 2)
    page = allocator.alloc(1)[0]
    if damage == "free twice":
        allocator._free.append(allocator._free[0])
    elif damage == "leak":
        allocator._free.pop()
    elif damage == "both":
        allocator._free.append(page)
    else:
        allocator._free.append(0)
    with pytest.raises(AssertionError):
        allocator.check()


@pytest.mark.parametrize("page_size", [0, -1, 257])
def test_page_sizes_out_of_range(page_size: int) -> None:
    with pytest.raises(ValueError, match=rf"kv.page_size={page_size}: must be from 1 to 256"):
        PagedAllocator(4, page_size)


def test_a_pool_without_pages() -> None:
    with pytest.raises(ValueError, match=r"kv.num_pages=0: must be at least 1"):
        PagedAllocator(0, 16)


def test_churn_is_a_matter_of_its_seed() -> None:
    def pages(seed: int) -> Pages:
        allocator = PagedAllocator(64, 1)
        allocator.churn(seed)
        return allocator.alloc(64)

    assert pages(1) == pages(1) != pages(2)
    assert pages(1) != sorted(pages(1)) and sorted(pages(1)) == list(range(1, 65))
