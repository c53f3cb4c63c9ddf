"""A page table as compressed rows, against plain Python, for the Triton kernel and its torch twin."""

from __future__ import annotations

import pytest
import torch

from fa_research.kernels import ops
from fa_research.kernels import page_indices as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize(
    ("module", "device"), [(kernels, DEVICE), (ops, "cpu")], ids=["kernel", "torch"]
)
UNTOUCHED = -7


@both
@pytest.mark.parametrize(
    ("page_size", "lens"),
    [
        (1, [1, 5, 2, 3, 1]),
        (3, [1, 3, 4, 30, 6]),
        (16, [160, 1, 15, 16, 17]),
        (128, [1]),
        (16, [40 * i % 161 + 1 for i in range(300)]),  # more requests than one load of the lengths
        (1, [1, 2500, 1100, 1024]),  # more pages than one block
    ],
)
def test_rows_lie_one_after_the_other(module, device: str, page_size: int, lens: list[int]) -> None:  # type: ignore[no-untyped-def]
    """In the heads of larger buffers, from a table whose rows are further apart than wide and end in garbage."""
    width = max(lens) // page_size + 4
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(10**6, (len(lens) + 1, width + 3), generator=generator, dtype=torch.int32)
    table_BP = base.to(device)[: len(lens), :width]
    seqlens_B = torch.tensor(lens, dtype=torch.int32, device=device)
    pages = [-(-n // page_size) for n in lens]
    indptr, indices, last = (
        torch.full((n,), UNTOUCHED, dtype=torch.int32, device=device)
        for n in (len(lens) + 3, sum(pages) + 5, len(lens) + 2)
    )
    module.compact_pages(table_BP, seqlens_B, page_size, indptr[: len(lens) + 1], indices, last[: len(lens)])
    rows = [page for row, count in zip(table_BP.tolist(), pages, strict=True) for page in row[:count]]
    assert indices.tolist() == rows + [UNTOUCHED] * 5
    assert indptr.tolist() == [sum(pages[:i]) for i in range(len(lens) + 1)] + [UNTOUCHED] * 2
    full = [n - (count - 1) * page_size for n, count in zip(lens, pages, strict=True)]
    assert last.tolist() == full + [UNTOUCHED] * 2
    assert all(1 <= n <= page_size for n in full)
