"""Split-KV decode against the dense float64 answer; the interpreter on a CPU, the compiled kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from fa_research.kernels.paged_decode import DecodeConfig, decode_config, paged_decode
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
SMALL = DecodeConfig(block_n=16, num_warps=4, num_stages=2, workers_per_sm=3, min_tiles=1)
RAGGED = [1, 15, 16, 17, 50, 0, 33]
MASKS = [{}, {"window": 1}, {"window": 21}, {"chunk": 16}, {"chunk": 13}, {"softcap": 2.0}]


def decode(case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    if "max_seq_len_k" not in options:
        options["max_seq_len_k"] = max(case.cache_seqlens.tolist(), default=0)
    options = {"_config": SMALL, "scale": SCALE, **options}
    tensors = (case.q, case.k, case.v, case.page_table, case.cache_seqlens)
    out, lse = paged_decode(*tensors, page_size=case.page_size, return_lse=True, **options)
    assert lse is not None
    return out, lse


def check(case: Case, sinks: torch.Tensor | None = None, semantics: dict | None = None, **options) -> None:
    semantics = semantics or {}
    out, lse = decode(case, sinks_H=sinks, **semantics, **options)
    expected, expected_lse = oracle(case, scale=SCALE, sinks=sinks, **semantics)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert_close(out, expected, TOLERANCE[case.q.dtype])
    assert_close(lse, expected_lse, TOLERANCE[case.q.dtype])


@pytest.mark.parametrize(
    ("page_size", "semantics"), [*((3, mask) for mask in MASKS), (16, {}), (16, {"window": 21})]
)
def test_masks_over_shuffled_pages(page_size: int, semantics: dict) -> None:
    check(make_case(RAGGED, page_size=page_size), semantics=semantics)


@pytest.mark.parametrize("page_size", [1, 4, 5, 32, 48, 256])
@pytest.mark.parametrize("semantics", [{}, {"window": 21, "chunk": 29}], ids=str)
def test_page_sizes(page_size: int, semantics: dict) -> None:
    """The keys of a tile in many pages, in one page, in pages that divide the tile, and in pages that do not."""
    lengths = [max(page_size - 1, 1), page_size, page_size + 1] if page_size < 256 else [40, 257]
    check(make_case(lengths, page_size=page_size, heads=2, kv_heads=1), semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("page_size", [5, 16])
def test_half_precision(dtype: torch.dtype, page_size: int) -> None:
    check(make_case(RAGGED, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize(
    "cut", [{}, {"num_splits": 1}, {"num_splits": 3}, {"num_splits": 7}, {"deterministic": True}]
)
@pytest.mark.parametrize("semantics", [{}, {"window": 40}, {"chunk": 32}], ids=str)
def test_every_way_to_cut_the_keys(cut: dict, semantics: dict) -> None:
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(make_case([90, 1, 48, 0], page_size=4, kv_heads=1), sinks, semantics, **cut)


@pytest.mark.parametrize("length", [15, 16, 17, 32, 33])
def test_chunk_boundaries(length: int) -> None:
    check(make_case([length, length + 1], page_size=16), semantics={"chunk": 16}, num_splits=2)


@pytest.mark.parametrize("semantics", [{"window": 20}, {"chunk": 24}], ids=str)
def test_keys_out_of_the_mask_are_not_read(semantics: dict) -> None:
    """Their pages may have been given to another request that has not written them yet."""
    case = make_case([70, 33], page_size=8)
    expected, _ = oracle(case, scale=SCALE, **semantics)
    for row, length in enumerate([70, 33]):
        first = max(
            length - semantics.get("window", length), (length - 1) // 24 * 24 * ("chunk" in semantics)
        )
        dead = slots_of(case.page_table[row], length, 8)[:first]
        case.k[dead] = case.v[dead] = float("nan")
    assert_close(decode(case, **semantics)[0], expected, 2e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (14, 2), (8, 1), (20, 1)])
def test_group_sizes(heads: int, kv_heads: int) -> None:
    check(make_case([40, 7], page_size=8, heads=heads, kv_heads=kv_heads), num_splits=2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_configuration(head_dim: int, dtype: torch.dtype) -> None:
    check(
        make_case([5, 200], page_size=16, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype), _config=None
    )


@pytest.mark.parametrize("head_dim", ODD_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_that_are_no_power_of_two(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([5, 200], page_size=16, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
    check(case, _config=None)
    check(case, semantics={"window": 40}, num_splits=3)


@pytest.mark.parametrize("head_dim", [*ODD_HEAD_DIMS, 32])
@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_nothing_behind_a_head_is_read_or_written(head_dim: int, page_size: int, num_splits: int) -> None:
    case = make_case([49, 17], page_size=page_size, heads=4, kv_heads=2, head_dim=head_dim)
    expected, _ = oracle(case, scale=SCALE)
    case, out = crowded(case)
    decode(case, num_splits=num_splits, out=out[..., :head_dim])
    assert_close(out[..., :head_dim], expected, 2e-5)
    assert (out[..., head_dim:] == 7).all()


def test_more_requests_than_workers_and_the_other_way_round() -> None:
    check(make_case([19] * 20, page_size=16, heads=2, kv_heads=1))
    check(make_case([130], page_size=16, heads=1, kv_heads=1))


def test_a_share_may_end_within_a_short_request() -> None:
    """Also where no request is as long as the fewest tiles that a worker takes."""
    for min_tiles in (2, 3, 5):
        config = DecodeConfig(16, num_warps=4, num_stages=2, workers_per_sm=3, min_tiles=min_tiles)
        check(make_case([20] * 7, page_size=16, heads=2, kv_heads=1), _config=config)


def test_deterministic_result_is_the_same_alone_and_in_any_batch() -> None:
    """Long enough for several splits of the default configuration."""
    lengths = [1300, 77, 600]
    together = make_case(lengths, page_size=16, heads=2, kv_heads=1)
    out, lse = decode(together, deterministic=True, _config=None, max_seq_len_k=4096)
    for row, length in enumerate(lengths):
        alone = Case(
            together.q[row : row + 1],
            together.k,
            together.v,
            together.page_table[row : row + 1],
            together.cache_seqlens[row : row + 1],
            together.cu_seqlens_q[:2],
            16,
        )
        single, single_lse = decode(alone, deterministic=True, _config=None, max_seq_len_k=length)
        assert torch.equal(single[0], out[row]) and torch.equal(single_lse[0], lse[row])
    expected, _ = oracle(together, scale=SCALE)
    assert_close(out, expected, 2e-5)


@pytest.mark.parametrize("options", [{}, {"num_splits": 4}, {"deterministic": True}], ids=str)
def test_bound_of_the_lengths_changes_nothing(options: dict) -> None:
    """A captured graph is launched for the longest context there may be, and the grid for more workers than tiles."""
    case = make_case([40, 3], page_size=4)
    tight, loose = (decode(case, max_seq_len_k=bound, **options) for bound in (40, 131072))
    for one, other in zip(tight, loose, strict=True):
        assert_close(one, other.double(), 1e-6)


def test_strided_tensors() -> None:
    """q as a view of a fused projection, K and V as the halves of one pool, out as a view, sinks per head."""
    case = make_case([40, 17], page_size=4, dtype=torch.float16)
    fused = torch.full((2, 11, 16), float("nan"), dtype=torch.float16, device=DEVICE)
    fused[:, 2:6] = case.q
    pool = torch.stack([case.k, case.v], 1)
    view = Case(
        fused[:, 2:6], pool[:, 0], pool[:, 1], case.page_table, case.cache_seqlens, case.cu_seqlens_q, 4
    )
    out = torch.full((2, 9, 16), 7.0, dtype=torch.float16, device=DEVICE)
    returned, _ = decode(view, out=out[:, 3:7], num_splits=2)
    expected, _ = oracle(case, scale=SCALE)
    assert returned.data_ptr() == out[:, 3:7].data_ptr()
    assert_close(out[:, 3:7], expected, 4e-3)
    assert (out[:, :3] == 7).all() and (out[:, 7:] == 7).all()


def test_sink_alone_takes_the_weight_it_should() -> None:
    """A sink as large as the sum of the scores halves the output and leaves the LSE as it is."""
    case = make_case([50, 1], page_size=8)
    plain, lse = decode(case)
    sunk, sunk_lse = decode(case, sinks_H=lse[0].contiguous())
    assert_close(sunk[0], plain[0].double() / 2, 1e-5)
    assert_close(sunk_lse, lse.double(), 1e-6)


def test_nothing_to_attend_to() -> None:
    sinks = torch.full((4,), float("-inf"), device=DEVICE)
    for options in ({}, {"sinks_H": sinks}, {"num_splits": 3}, {"window": 4}):
        out, lse = decode(make_case([0, 0], page_size=4), **options)
        assert (out == 0).all() and (lse == float("-inf")).all()
    out, lse = decode(make_case([], page_size=4))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@pytest.mark.parametrize("page_size", [8, 16])
def test_offsets_pass_two_to_the_31(page_size: int) -> None:
    """Only the top pages of a pool of more than 2**31 elements; pages that nobody touches cost no memory."""
    case = make_case([20, 9], page_size=page_size, dtype=torch.float16)
    slots = -(-(2**31 + 2**20) // (2 * 16)) // 16 * 16
    pool = torch.empty((slots, 2, 16), dtype=torch.float16, device=DEVICE)
    shift = slots - case.k.shape[0]
    pool[shift:] = case.k
    table = case.page_table + shift // page_size
    same = Case(case.q, pool, pool, table, case.cache_seqlens, case.cu_seqlens_q, page_size)
    case.v = case.k
    out, _ = decode(same)
    assert_close(out, oracle(case, scale=SCALE)[0], 4e-3)


def test_launch_configuration_does_not_know_the_batch() -> None:
    """`deterministic` rests on it."""
    assert decode_config(128, 4, 2, 16) == decode_config(128, 4, 2, 16)
    for head_dim in (64, 128, 256, *ODD_HEAD_DIMS):
        for itemsize in (2, 4):
            config = decode_config(head_dim, 4, itemsize, 16)
            assert config.block_n >= 16 and config.block_n & (config.block_n - 1) == 0


@pytest.mark.gpu
def test_graph_captured_short_is_replayed_at_the_longest_length() -> None:
    case = make_case([3000, 517, 64], page_size=16, head_dim=128, dtype=torch.bfloat16)
    lengths = case.cache_seqlens.clone()
    case.cache_seqlens.fill_(1)
    decode(case, _config=None, max_seq_len_k=131072)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(case, _config=None, max_seq_len_k=131072)
    for divisor in (1, 2, 64, 1):
        case.cache_seqlens.copy_(lengths // divisor)
        out.fill_(float("nan"))
        graph.replay()
        expected, expected_lse = oracle(case, scale=SCALE)
        assert_close(out, expected, 3e-2)
        assert_close(lse, expected_lse, 3e-2)
