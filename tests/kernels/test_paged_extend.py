"""Ragged paged extend against the dense float64 answer; the interpreter on a CPU, the compiled kernel on a GPU."""

from __future__ import annotations

import pytest
import torch

from fa_research.kernels.paged_decode import paged_decode
from fa_research.kernels.paged_extend import ExtendConfig, paged_extend
from tests.kernels.attention_oracle import (
    DEVICE,
    DTYPES,
    ODD_HEAD_DIMS,
    TOLERANCE,
    Case,
    assert_close,
    crowded,
    make_case,
    oracle,
    slots_of,
)

SCALE = 0.3
SMALL = ExtendConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
# No prefix, one new token on a prefix, a prefix, a full tile, nothing new, nothing at all, more tiles than one.
SEQLENS = [5, 31, 40, 16, 9, 0, 49]
Q_LENS = [5, 1, 17, 16, 0, 0, 33]
MASKS = [{}, {"causal": False}, {"window": 1}, {"window": 21}, {"chunk": 16}, {"chunk": 13}, {"softcap": 2.0}]


def extend(case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    q_lens = case.cu_seqlens_q.diff().tolist()
    bounds = {
        "max_seq_len_q": max(q_lens, default=0),
        "max_seq_len_k": max(case.cache_seqlens.tolist(), default=0),
    }
    options = {"_config": SMALL, "scale": SCALE, **bounds, **options}
    tensors = (case.q, case.k, case.v, case.page_table, case.cache_seqlens, case.cu_seqlens_q)
    out, lse = paged_extend(*tensors, page_size=case.page_size, return_lse=True, **options)
    assert lse is not None
    return out, lse


def check(case: Case, sinks: torch.Tensor | None = None, semantics: dict | None = None, **options) -> None:
    semantics = semantics or {}
    out, lse = extend(case, sinks_H=sinks, **semantics, **options)
    expected, expected_lse = oracle(case, scale=SCALE, sinks=sinks, **semantics)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert_close(out, expected, TOLERANCE[case.q.dtype])
    assert_close(lse, expected_lse, TOLERANCE[case.q.dtype])


@pytest.mark.parametrize(
    ("page_size", "semantics"), [*((3, mask) for mask in MASKS), (16, {}), (16, {"window": 21})]
)
def test_masks_over_shuffled_pages(page_size: int, semantics: dict) -> None:
    check(make_case(SEQLENS, Q_LENS, page_size=page_size, kv_heads=1), semantics=semantics)


@pytest.mark.parametrize("page_size", [1, 4, 5, 32, 48, 256])
@pytest.mark.parametrize("semantics", [{}, {"window": 21, "chunk": 29}], ids=str)
def test_page_sizes(page_size: int, semantics: dict) -> None:
    """The keys of a tile in many pages, in one page, in pages that divide the tile, and in pages that do not."""
    size = min(page_size, 64)
    case = make_case(
        [size + 1, max(size - 1, 1), size], [2, 1, size], page_size=page_size, heads=2, kv_heads=1
    )
    check(case, semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("semantics", [{}, {"window": 21}], ids=str)
def test_half_precision(dtype: torch.dtype, semantics: dict) -> None:
    check(make_case(SEQLENS, Q_LENS, page_size=5, kv_heads=1, dtype=dtype), semantics=semantics)


@pytest.mark.parametrize("prefix", [15, 16, 17, 32])
@pytest.mark.parametrize("semantics", [{"chunk": 16}, {"window": 16}], ids=str)
def test_mask_edges_at_tile_edges(prefix: int, semantics: dict) -> None:
    """Queries before, at and behind a chunk's border, with a whole chunk in the cache and without."""
    check(make_case([prefix + 20], [20], page_size=16, heads=2, kv_heads=1), semantics=semantics)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (14, 2), (8, 1), (20, 1)])
def test_group_sizes(heads: int, kv_heads: int) -> None:
    """A group that does not divide the tile leaves rows idle; one above it makes the tile larger."""
    check(make_case([30, 7], [21, 7], page_size=8, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_configuration(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([5, 200], [5, 90], page_size=16, heads=4, kv_heads=1, head_dim=head_dim, dtype=dtype)
    check(case, _config=None)


@pytest.mark.parametrize("head_dim", ODD_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_that_are_no_power_of_two(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([5, 200], [5, 90], page_size=16, heads=4, kv_heads=1, head_dim=head_dim, dtype=dtype)
    check(case, _config=None)


@pytest.mark.parametrize("head_dim", [*ODD_HEAD_DIMS, 32])
@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("semantics", [{}, {"window": 21}], ids=str)
def test_nothing_behind_a_head_is_read_or_written(head_dim: int, page_size: int, semantics: dict) -> None:
    """In tiles that are masked and in those that are not."""
    case = make_case([49, 17], [20, 17], page_size=page_size, heads=4, kv_heads=2, head_dim=head_dim)
    expected, _ = oracle(case, scale=SCALE, **semantics)
    case, out = crowded(case)
    extend(case, out=out[..., :head_dim], **semantics)
    assert_close(out[..., :head_dim], expected, 2e-5)
    assert (out[..., head_dim:] == 7).all()


@pytest.mark.parametrize("block", [(16, 32), (64, 16), (32, 32)])
def test_tiles_of_other_shapes(block: tuple[int, int]) -> None:
    """Many masked tiles a row block (wide tiles of queries), and rows whose keys end inside one tile."""
    config = ExtendConfig(*block, num_warps=4, num_stages=2)
    for semantics in ({}, {"window": 9}, {"chunk": 24}):
        case = make_case([70, 33], [51, 33], page_size=16, heads=1, kv_heads=1)
        check(case, semantics=semantics, _config=config)


@pytest.mark.parametrize("semantics", [{"window": 20}, {"chunk": 24}], ids=str)
def test_keys_out_of_every_mask_are_not_read(semantics: dict) -> None:
    """Their pages may have been given to another request that has not written them yet."""
    case = make_case([70, 33], [9, 1], page_size=8)
    expected, _ = oracle(case, scale=SCALE, **semantics)
    for row, (length, position) in enumerate([(70, 61), (33, 32)]):
        first = max(
            position + 1 - semantics.get("window", length), position // 24 * 24 * ("chunk" in semantics)
        )
        dead = slots_of(case.page_table[row], length, 8)[:first]
        case.k[dead] = case.v[dead] = float("nan")
    assert_close(extend(case, **semantics)[0], expected, 2e-5)


def test_sinks_and_heads() -> None:
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(make_case([30, 7], [21, 7], page_size=8, heads=6, kv_heads=2), sinks, {"window": 12})


def test_positions_before_the_first_key_see_nothing() -> None:
    """More queries than keys, as padding may have it: zeros and -inf, also with a sink."""
    case = make_case([3, 0], [6, 4], page_size=4)
    for sinks in (None, torch.zeros(4, device=DEVICE)):
        check(case, sinks)
        out, lse = extend(case, sinks_H=sinks)
        assert (out[:3] == 0).all() and (lse[:3] == float("-inf")).all() and (out[3:6] != 0).all()
    out, lse = extend(make_case([], page_size=4))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_one_new_token_is_a_decode_step() -> None:
    case = make_case([17, 48, 1], page_size=16)
    out, lse = extend(case)
    tensors = (case.q, case.k, case.v, case.page_table, case.cache_seqlens)
    decoded, decoded_lse = paged_decode(
        *tensors, page_size=16, max_seq_len_k=48, scale=SCALE, return_lse=True
    )
    assert_close(out, decoded.double(), 1e-5)
    assert_close(lse, decoded_lse.double(), 1e-5)


def test_strided_tensors() -> None:
    """q as a view of a fused projection, K and V as the halves of one pool, out as a view."""
    case = make_case([40, 17], [20, 17], page_size=4, dtype=torch.float16)
    fused = torch.full((37, 11, 16), float("nan"), dtype=torch.float16, device=DEVICE)
    fused[:, 2:6] = case.q
    pool = torch.stack([case.k, case.v], 1)
    view = Case(
        fused[:, 2:6], pool[:, 0], pool[:, 1], case.page_table, case.cache_seqlens, case.cu_seqlens_q, 4
    )
    out = torch.full((37, 9, 16), 7.0, dtype=torch.float16, device=DEVICE)
    returned, _ = extend(view, out=out[:, 3:7])
    assert returned.data_ptr() == out[:, 3:7].data_ptr()
    assert_close(out[:, 3:7], oracle(case, scale=SCALE)[0], 4e-3)
    assert (out[:, :3] == 7).all() and (out[:, 7:] == 7).all()


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    seqlens, q_lens = [50, 31, 20], [33, 1, 20]
    together = make_case(seqlens, q_lens, page_size=16, heads=2, kv_heads=1)
    out, _ = extend(together)
    for row in range(3):
        begin, end = together.cu_seqlens_q[row : row + 2].tolist()
        table, lens = together.page_table[row : row + 1], together.cache_seqlens[row : row + 1]
        cu = torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE)
        alone, _ = extend(Case(together.q[begin:end], together.k, together.v, table, lens, cu, 16))
        assert torch.equal(alone, out[begin:end])


@pytest.mark.parametrize("page_size", [8, 16])
def test_offsets_pass_two_to_the_31(page_size: int) -> None:
    """Only the top pages of a pool of more than 2**31 elements; pages that nobody touches cost no memory."""
    case = make_case([20, 9], [18, 9], page_size=page_size, dtype=torch.float16)
    slots = -(-(2**31 + 2**20) // (2 * 16)) // 16 * 16
    pool = torch.empty((slots, 2, 16), dtype=torch.float16, device=DEVICE)
    shift = slots - case.k.shape[0]
    pool[shift:] = case.k
    table = case.page_table + shift // page_size
    same = Case(case.q, pool, pool, table, case.cache_seqlens, case.cu_seqlens_q, page_size)
    case.v = case.k
    assert_close(extend(same)[0], oracle(case, scale=SCALE)[0], 4e-3)
