"""Keys and values out of shuffled pages: kernel and torch twin against plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research.kernels import gather
from fa_research.kernels import gather_kv as kernels
from tests.kernels.attention_oracle import DEVICE, DTYPES

UNTOUCHED = -7.0
TAIL = 5
LENGTHS = ([1, 37, 0, 16, 1], [300, 3])


def pools(slots: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Keys with 40 dimensions and values with 24, of 3 heads: no power of two; NaN nowhere but in page 0."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(slots, 3, dim, generator=generator).to(device, dtype) for dim in (40, 24))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("module", "device"), [(kernels, str(DEVICE)), (gather, "cpu")], ids=["kernel", "torch"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("lens", LENGTHS, ids=["ragged", "long"])
@pytest.mark.parametrize("apart", [None, 320], ids=["packed", "rows"])
def test_gather(
    module, device: str, dtype: torch.dtype, page_size: int, lens: list[int], apart: int | None, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(
        kernels, "_PROGRAMS", 4
    )  # two a request, of 64 tokens at a time: the long one is looped over
    pages = [-(-n // page_size) for n in lens]
    order = (torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)) + 1).to(torch.int32)
    table = torch.full((len(lens), max(pages) + 2), 2**30, dtype=torch.int32)  # rubbish past the last page
    for row, own in enumerate(order.split(pages)):
        table[row, : len(own)] = own
    table[-1, 0] = 0  # the last request's first page is the sink: padding
    k, v = pools((sum(pages) + 1) * page_size, dtype, device)
    k[:page_size], v[:page_size] = torch.nan, torch.nan
    starts = [0]
    for n in lens:
        starts.append(starts[-1] + (apart or n))
    outs = [
        torch.full((starts[-1] + TAIL + 3, *x.shape[1:]), UNTOUCHED, dtype=dtype, device=device)
        for x in (k, v)
    ]
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lens, starts)]
    module.gather_kv(k, v, table.to(device), *ints, page_size, *outs, TAIL)
    for cache, out in zip((k, v), outs, strict=True):
        expected = torch.full_like(out, UNTOUCHED)
        for row, (n, start) in enumerate(zip(lens, starts[:-1], strict=True)):
            for token in range(n):
                page = int(table[row, token // page_size])
                expected[start + token] = cache[page * page_size + token % page_size] if page else 0
        expected[starts[-1] : starts[-1] + TAIL] = 0
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_known_failure_14_offsets_past_2_to_the_31() -> None:
    """Only the top pages of a pool with more than 2**31 elements, and rows as far up in the buffer."""
    slots, row = 2**21 + 2**10, 1024
    cache = torch.zeros(slots, 8, 128, dtype=torch.bfloat16, device="cuda")
    assert slots * row > 2**31
    cache[-2:] = torch.randn(2, 8, 128, device="cuda").bfloat16()
    out = torch.zeros_like(cache)
    ints = [
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in ([[slots - 1, slots - 2]], [2], [slots - 2, slots])
    ]
    kernels.gather_kv(cache, cache, *ints, 1, out, torch.empty_like(out))
    assert torch.equal(out[-2:], cache[-2:].flip(0)) and bool(cache[-1].any())
