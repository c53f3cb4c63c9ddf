"""Batches: what the host says and what the device looks up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fa_research.batch import ForwardMode, extend_batch
from tests.helpers import DEVICES, age, examples, make_cache, slots_of, tokens


@examples(40)
@given(
    page_size=st.sampled_from([1, 3, 16, 256]),
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_extend_batch_against_lists(page_size: int, lens: list[tuple[int, int]], seed: int) -> None:
    check_extend_batch("cpu", page_size, lens, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_extend_batch_on_the_gpu(page_size: int) -> None:
    check_extend_batch("cuda", page_size, [(0, 20), (40, 1), (7, 12)], 5)


def check_extend_batch(device: str, page_size: int, lens: list[tuple[int, int]], seed: int) -> None:
    pages = sum(-(-sum(pair) // page_size) for pair in lens) + 2
    cache = make_cache(pages, page_size, device=device)
    age(cache, seed)
    requests = [cache.open() for _ in lens]
    cache.extend(requests, [prefix for prefix, _ in lens])
    cache.extend(requests, [new for _, new in lens])
    words = [[100 * i + j for j in range(new)] for i, (_, new) in enumerate(lens)]
    rows = [request.row for request in requests]
    batch = extend_batch(cache.req_to_token.req_to_token, rows, [prefix for prefix, _ in lens], words)

    slots = [slots_of(cache, request)[prefix:] for request, (prefix, _) in zip(requests, lens, strict=True)]
    assert batch.input_ids_T.tolist() == sum(words, [])
    assert batch.positions_T.tolist() == [p for prefix, new in lens for p in range(prefix, prefix + new)]
    assert batch.out_cache_loc_T.tolist() == sum(slots, [])
    assert batch.req_pool_indices_B.tolist() == rows
    totals, new = [sum(pair) for pair in lens], [n for _, n in lens]
    assert batch.extend_seq_lens_B is not None
    assert batch.seq_lens_B.tolist() == list(batch.seq_lens_cpu) == totals
    assert batch.extend_seq_lens_B.tolist() == list(batch.extend_seq_lens_cpu) == new
    assert (batch.max_seq_len_q, batch.max_seq_len_k) == (max(new), max(totals))
    assert (batch.batch_size, batch.num_tokens) == (len(lens), sum(new))
    longs = (batch.input_ids_T, batch.positions_T, batch.out_cache_loc_T)
    assert {x.dtype for x in longs} == {torch.int64}
    assert {x.dtype for x in (batch.req_pool_indices_B, batch.seq_lens_B, batch.extend_seq_lens_B)} == {
        torch.int32
    }
    assert all(x.device.type == device for x in (*longs, batch.seq_lens_B))


@pytest.mark.parametrize(
    ("new", "mode"),
    [
        ([3], ForwardMode.EXTEND),
        ([1], ForwardMode.EXTEND),
        ([5, 2], ForwardMode.EXTEND),
        ([1, 1], ForwardMode.EXTEND),
        ([1, 2], ForwardMode.MIXED),
        ([4, 1, 1], ForwardMode.MIXED),
    ],
)
def test_modes(new: list[int], mode: ForwardMode) -> None:
    cache = make_cache(40, 1)
    requests = [cache.open() for _ in new]
    cache.extend(requests, new)
    rows = [request.row for request in requests]
    assert extend_batch(cache.req_to_token.req_to_token, rows, [0] * len(new), tokens(new)).mode is mode


@pytest.mark.parametrize("new", [[], [0], [3, 0, 2]])
def test_a_prompt_of_length_zero(new: list[int]) -> None:
    table = torch.zeros(5, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one new token"):
        extend_batch(table, range(1, len(new) + 1), [0] * len(new), tokens(new))


@pytest.mark.parametrize(("rows", "prefixes"), [([1], [0, 0]), ([1, 2], [0])])
def test_lists_of_different_lengths(rows: list[int], prefixes: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        extend_batch(torch.zeros(5, 16, dtype=torch.int32), rows, prefixes, tokens([2, 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_may_be_tensors(device: str) -> None:
    table = torch.arange(32, dtype=torch.int32, device=device).view(2, 16)
    batch = extend_batch(table, [1], [2], [torch.tensor([7, 8, 9])])
    assert batch.input_ids_T.tolist() == [7, 8, 9] and batch.out_cache_loc_T.tolist() == [18, 19, 20]
