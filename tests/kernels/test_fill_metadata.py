"""Metadata and decode-step kernels, and their torch twins, against plain Python over shuffled slots."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fa_research.kernels import fill_metadata as kernels
from fa_research.kernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize(
    ("module", "device"), [(kernels, DEVICE), (ops, "cpu")], ids=["kernel", "torch"]
)
UNTOUCHED = -7


def ints(values: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def make_table(
    rows: int, width: int, page_size: int, device: str, seed: int = 0
) -> tuple[Tensor, list[list[int]]]:
    """A ``req_to_token`` [rows, width] of shuffled pages (never page 0), and the pages of each row."""
    pages_per_row = -(-width // page_size)
    pages = list(range(1, rows * pages_per_row + 1))
    random.Random(seed).shuffle(pages)
    of_row = [pages[i * pages_per_row : (i + 1) * pages_per_row] for i in range(rows)]
    slots = [[page * page_size + s for page in row for s in range(page_size)][:width] for row in of_row]
    return torch.tensor(slots, dtype=torch.int32, device=device), of_row


def cumulative(lens: list[int]) -> list[int]:
    return [sum(lens[:i]) for i in range(len(lens) + 1)]


def outputs(batch: int, pages: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads of larger static buffers, as CUDA graphs use them: the table's rows are further apart than wide."""
    table = torch.full((batch + 2, pages + 3), UNTOUCHED, dtype=torch.int32, device=device)
    cache, cu_q, cu_k = (
        torch.full((n,), UNTOUCHED, dtype=torch.int32, device=device)
        for n in (batch + 2, batch + 3, batch + 3)
    )
    return cache[:batch], cu_q[: batch + 1], cu_k[: batch + 1], table[:batch, :pages]


@both
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "extend"])
def test_fill_metadata(module, device: str, page_size: int, decode: bool) -> None:
    width = 300
    req_to_token, pages_of_row = make_table(7, width, page_size, device)
    rows = [3, 1, 6, 0, 2]
    seq_lens = [
        1,
        width,
        2 * page_size,
        1,
        2 * page_size + 1,
    ]  # first token, the limit, a full page, padding, one over
    new = [1] * 5 if decode else [1, 40, 2, 1, page_size]
    pages = -(-width // page_size)
    cache, cu_q, cu_k, table = outputs(5, pages, device)
    module.fill_metadata(
        req_to_token, ints(rows, device), ints(seq_lens, device), None if decode else ints(new, device), page_size,
        cache, cu_q, cu_k, table,
    )  # fmt: skip
    assert cache.tolist() == seq_lens
    assert cu_q.tolist() == cumulative(new)
    assert cu_k.tolist() == cumulative(seq_lens)
    begun = [-(-n // page_size) for n in seq_lens]
    expected = [pages_of_row[row][:n] + [UNTOUCHED] * (pages - n) for row, n in zip(rows, begun, strict=True)]
    assert table.tolist() == expected
    # Nothing past the heads of the static buffers.
    assert int(cache._base[-1]) == int(cu_q._base[-1]) == int(cu_k._base[-1]) == UNTOUCHED
    assert table._base[5:].unique().tolist() == table._base[:, pages:].unique().tolist() == [UNTOUCHED]


@both
def test_table_wider_than_the_pool_of_programs(module, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs stride over a long row; page tables as wide as the context limit cost programs that do
    nothing.
    """
    monkeypatch.setattr(kernels, "_PAGES_PROGRAMS", 4)
    req_to_token, pages_of_row = make_table(3, 5000, 1, device)
    cache, cu_q, cu_k, table = outputs(2, 5000, device)
    assert kernels.programs_per_request(2, 5000) == 2
    module.fill_metadata(
        req_to_token, ints([2, 1], device), ints([4999, 3], device), None, 1, cache, cu_q, cu_k, table
    )
    assert table.tolist() == [pages_of_row[2][:4999] + [UNTOUCHED], pages_of_row[1][:3] + [UNTOUCHED] * 4997]


def test_lengths_of_a_batch_wider_than_a_block() -> None:
    """Cumulative lengths carry from block to block; the one program that makes them is launched alone."""
    batch, rng = 2500, random.Random(0)
    seq_lens, new = ([rng.randint(1, 100_000) for _ in range(batch)] for _ in range(2))
    cache, cu_q, cu_k, table = outputs(batch, 1, DEVICE)
    kernels._fill_metadata_kernel[(1,)](
        table,
        table,
        ints(seq_lens, DEVICE),
        ints(new, DEVICE),
        cache,
        cu_q,
        cu_k,
        table,
        batch,
        1,
        1,
        1,
        1,
        16,
        1024,
        1024,
    )
    assert cache.tolist() == seq_lens
    assert cu_q.tolist() == cumulative(new)
    assert cu_k.tolist() == cumulative(seq_lens)


@both
def test_a_table_narrower_than_a_request_is_not_overrun(module, device: str) -> None:
    req_to_token, pages_of_row = make_table(2, 64, 4, device)
    cache, cu_q, cu_k, table = outputs(1, 5, device)
    module.fill_metadata(
        req_to_token, ints([1], device), ints([64], device), None, 4, cache, cu_q, cu_k, table
    )
    assert table.tolist() == [pages_of_row[1][:5]]
    assert table._base[:, 5:].unique().tolist() == [UNTOUCHED]


@both
def test_advance_decode(module, device: str) -> None:
    """Three steps of a padded batch, across a page's end and up to the last slot of the table."""
    width = 12
    req_to_token, _ = make_table(5, width, 4, device)
    slots = req_to_token.tolist()
    rows, lens = [4, 0, 2, 1, 0], [3, 1, width - 3, 7, 1]
    indices, seq_lens = ints(rows, device), ints(lens, device)
    positions, loc = (torch.full((5,), UNTOUCHED, dtype=torch.int64, device=device) for _ in range(2))
    for step in range(3):
        module.advance_decode(req_to_token, indices, seq_lens, positions, loc)
        at = [lens[b] + step if rows[b] else 0 for b in range(5)]
        assert positions.tolist() == at
        assert seq_lens.tolist() == [p + 1 for p in at]
        assert loc.tolist() == [slots[row][p] if row else 0 for row, p in zip(rows, at, strict=True)]


@both
def test_advance_past_the_table_goes_to_the_sink(module, device: str) -> None:
    """The host reserves ahead and never lets this happen; if it does, no other request's slot is written."""
    req_to_token, _ = make_table(3, 8, 4, device)
    seq_lens, positions, loc = ints([8, 2], device), *(ints([0, 0], device, torch.int64) for _ in range(2))
    module.advance_decode(req_to_token, ints([1, 2], device), seq_lens, positions, loc)
    assert loc.tolist() == [0, int(req_to_token[2, 2])]
    assert seq_lens.tolist() == [9, 3]


@both
def test_advance_decode_of_more_requests_than_a_block(module, device: str) -> None:
    batch = 300
    req_to_token, _ = make_table(batch + 1, 6, 1, device)
    indices, seq_lens = (
        torch.arange(1, batch + 1, dtype=torch.int32, device=device),
        torch.full((batch,), 4).int().to(device),
    )
    positions, loc = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    module.advance_decode(req_to_token, indices, seq_lens, positions, loc)
    assert torch.equal(loc, req_to_token[1:, 4].long())
    assert bool((seq_lens == 5).all())
    assert bool((positions == 4).all())
