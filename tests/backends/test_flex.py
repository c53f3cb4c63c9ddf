"""`flex`: which pages its kernels are given, what it compiles, what it refuses.

Off the GPU Flex computes every score and looks at no list of pages, so the lists are checked here on their own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.backends.flex import FlexBackend
from fa_research.backends.flex_pages import cut, list_pages
from fa_research.errors import ConfigError, Unsupported
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from tests.backends.replays import check_replays
from tests.helpers import DEVICES, Scene, make_spec

LENS = {
    "extend": ((0, 130), (300, 1), (0, 0), (131, 257), (5, 3), (128, 128)),
    "decode": ((0, 1), (15, 1), (16, 1), (299, 1)),
}
MASKS = (Causal(), SlidingWindow(1), SlidingWindow(40), SlidingWindow(200), Chunked(48), Chunked(7), Full())


@dataclass(frozen=True)
class EveryThird(Mask):
    """No band says it."""

    name = "every_third"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & ((k_pos % 3 == 0) | (k_pos == q_pos))

    def band(self) -> None:
        return None


def metadata_of(lens: tuple[tuple[int, int], ...], page_size: int) -> FlashAttentionMetadata:
    """Tables of shuffled pages; what lies behind a request's last page are pages of others."""
    totals = torch.tensor([prefix + new for prefix, new in lens])
    width = int(totals.max()) // page_size + 2
    pages = torch.randperm(len(lens) * width, generator=torch.Generator().manual_seed(0)) + 1
    table = pages.view(len(lens), width).int()
    used = -(-totals // page_size)
    table[:, 1:] = torch.where(torch.arange(1, width) < used[:, None], table[:, 1:], table[0, 0])
    new = torch.tensor([0, *(new for _, new in lens)], dtype=torch.int32)
    lengths = torch.nn.functional.pad(totals.cumsum(0), (1, 0)).int()
    max_q = max(new for _, new in lens)
    return FlashAttentionMetadata(
        totals.int(),
        new.cumsum(0).int(),
        lengths,
        table,
        page_size,
        max_q,
        int(totals.max()),
        max_q if max_q == 1 else None,
    )


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("batch", list(LENS))
@pytest.mark.parametrize("mask", [*MASKS, EveryThird()], ids=str)
def test_the_pages_listed_are_those_that_the_mask_needs(mask: Mask, batch: str, page_size: int) -> None:
    """For each query: every key it may see lies in a listed page, those listed as whole hold no other key, and what is
    read beside them is little."""
    lens = LENS[batch]
    metadata = metadata_of(lens, page_size)
    num_tokens, num_pages = sum(new for _, new in lens), int(metadata.page_table_BP.max()) + 1
    tiles = cut(metadata, num_tokens, num_pages * page_size)
    blocks = list_pages(metadata, tiles, mask)
    seen_tokens = []
    for i, request in enumerate(tiles.request_I.tolist()):
        partial = blocks.partial_IW[i, : blocks.num_partial_I[i]].tolist()
        whole = [] if blocks.num_full_I is None else blocks.full_IW[i, : blocks.num_full_I[i]].tolist()
        prefix, new = lens[request]
        length, first = prefix + new, int(tiles.first_I[i])
        queries = range(first, min(first + (1 if batch == "decode" else 128), length))
        own = metadata.page_table_BP[request, : -(-length // page_size)].tolist()
        at = {page: place for place, page in enumerate(own)}
        assert [int(tiles.logical_BN[request, page]) for page in own] == list(range(len(own)))
        assert len({*partial, *whole}) == len(partial) + len(whole) and {*partial, *whole} <= set(own)
        if not queries:
            assert not partial and not whole
            continue
        start = sum(other for _, other in lens[:request]) - prefix
        seen_tokens += [start + position for position in queries]
        allowed = mask.allows(torch.tensor(queries)[:, None], torch.arange(length))
        pages = list(allowed.split(page_size, dim=1))
        needed = {own[place] for place, page in enumerate(pages) if page.any()}
        assert needed <= {*partial, *whole}
        assert all(pages[at[page]].all() and pages[at[page]].shape[1] == page_size for page in whole)
        if mask.band() is not None:
            assert {*partial, *whole} == needed
        if blocks.num_full_I is not None:
            assert all(not pages[at[page]].all() or pages[at[page]].shape[1] < page_size for page in partial)
    assert sorted(seen_tokens) == list(range(num_tokens))


@pytest.mark.parametrize("batch", list(LENS))
def test_tiles_hold_every_query_once(batch: str) -> None:
    metadata = metadata_of(LENS[batch], 16)
    num_tokens = int(metadata.cu_seqlens_q_B1[-1])
    tiles = cut(metadata, num_tokens, 16 * (int(metadata.page_table_BP.max()) + 1))
    if batch == "decode":
        assert tiles.token_IR is None and tiles.row_T is None
        return
    assert tiles.token_IR is not None and tiles.row_T is not None
    assert tiles.token_IR.flatten()[tiles.row_T].tolist() == list(range(num_tokens))


def test_a_mask_that_is_no_band() -> None:
    for lens, decode in ((((0, 17), (31, 9), (20, 1)), False), (((0, 1), (16, 1), (49, 1)), True)):
        scene = Scene(make_spec((6, 2), 64, EveryThird(), 4.0), lens, 16, torch.float64, decode=decode)
        scene.check(scene.backend("flex"))


def test_off_the_gpu_nothing_is_traced_and_nobody_is_warned() -> None:
    scene = Scene(make_spec(), ((0, 17),), 16, torch.float32)
    backend = scene.backend("flex")
    assert "on the CPU it materialises every score" in backend.notes[0]
    from torch._dynamo.utils import counters

    before = sum(counters["stats"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene.run(backend)
    assert sum(counters["stats"].values()) == before


def test_it_compiles_as_one_graph_a_shape() -> None:
    """What a GPU runs, with dynamo's `eager` compiler in place of Triton, and with more shapes than dynamo's limit."""
    import torch._dynamo

    spec = make_spec(mask=SlidingWindow(7), softcap=4.0)
    scene = Scene(spec, ((0, 1), (16, 1), (33, 1)), 16, torch.float32, decode=True)
    backend = scene.backend("flex")
    assert isinstance(backend, FlexBackend)
    backend.compiler = "eager"
    with torch._dynamo.config.patch(recompile_limit=1):
        for compiled, which in enumerate([[0], [0, 1], [2], [0, 1, 2]], 1):
            scene.check_outputs(scene.run(backend, which), which)
            assert len(backend._runs) == compiled - (compiled > 2)
        with torch.inference_mode():
            scene.check_outputs(scene.run(backend), range(3))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"deterministic": True}, r"backend\.deterministic=true: FlexAttention's splits"),
        ({"num_splits": 4}, r"backend\.num_splits=4: on the CPU there are no splits; use 0"),
        ({"kv_dtype": torch.float16}, r"kv\.dtype float16: .* alone, float32"),
    ],
)
def test_what_it_refuses(more: dict[str, Any], reason: str) -> None:
    settings = replace(backends.BackendSettings(torch.device("cpu"), torch.float32, 16, 128), **more)
    with pytest.raises(Unsupported, match=reason):
        backends.create("flex", settings, [make_spec()])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_m": "wide"}, "block_m=wide: must be a power of two"),
        ({"num_warps": 6}, "num_warps=6: must be a power of two"),
        ({"num_stages": 0}, "num_stages=0: must be a whole number from 1 on"),
        ({"block_n": 32}, r"block_n=32: .* must divide kv\.page_size=16"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str) -> None:
    settings = backends.BackendSettings(torch.device("cpu"), torch.float32, 16, 128, options=options)
    with pytest.raises(ConfigError, match=rf"backend\.options\.{says}"):
        backends.create("flex", settings, [make_spec()])


def test_options_without_an_effect_are_told() -> None:
    settings = backends.BackendSettings(
        torch.device("cpu"), torch.float32, 16, 128, options={"num_stages": 3}
    )
    (note,) = backends.create("flex", settings, [make_spec()]).notes
    assert note.endswith("backend.options change nothing")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("page_size", "spec", "reason"),
    [
        (8, make_spec(), "kv.page_size=8: must be a multiple of 16"),
        (96, make_spec(), "kv.page_size=96: FlexAttention takes 16, 32, 48 and multiples of 64 on a GPU"),
        (16, make_spec(head_dim=8), "head dim 8, 8 of values: takes 16 to 256 on a GPU"),
    ],
)
def test_what_it_refuses_on_a_gpu(page_size: int, spec: Any, reason: str) -> None:
    settings = backends.BackendSettings(torch.device("cuda"), torch.bfloat16, page_size, 128)
    assert backends.reasons_against("flex", settings, [spec]) == (reason,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("page_size", "mask"), [(16, SlidingWindow(100)), (128, Causal())], ids=str)
def test_a_captured_step_follows_the_lengths(device: str, page_size: int, mask: Mask) -> None:
    check_replays("flex", page_size, mask, device)
