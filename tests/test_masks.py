"""Masks: the predicate, the band that kernels take, and the registry."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from fa_research import masks
from fa_research.masks import Band, Causal, Chunked, Full, Mask, SlidingWindow, Streaming
from fa_research.spec import AttentionSpec

EVERY = [
    Causal(),
    Full(),
    SlidingWindow(1),
    SlidingWindow(3),
    SlidingWindow(50),
    Chunked(1),
    Chunked(4),
    Chunked(50),
    Streaming(3),
]


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (Causal(), ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        (Full(), ["xxxxx"] * 5),
        (SlidingWindow(1), ["x....", ".x...", "..x..", "...x.", "....x"]),
        (SlidingWindow(3), ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]),
        (Chunked(2), ["x....", "xx...", "..x..", "..xx.", "....x"]),
        (Streaming(2, 1), ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]),
        (Streaming(2, sink_tokens=0), ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
        (Chunked(3), ["x....", "xx...", "xxx..", "...x.", "...xx"]),
    ],
    ids=str,
)
def test_the_picture(mask: Mask, picture: list[str]) -> None:
    drawn = ["".join("x" if mask.allows(q, k) else "." for k in range(5)) for q in range(5)]
    assert drawn == picture


@pytest.mark.parametrize("mask", EVERY, ids=str)
def test_tensors_and_ints_agree(mask: Mask) -> None:
    q, k = torch.arange(20)[:, None], torch.arange(20)[None, :]
    table = mask.allows(q, k)
    assert table.dtype == torch.bool and table.shape == (20, 20)
    assert table.tolist() == [[bool(mask.allows(i, j)) for j in range(20)] for i in range(20)]


@pytest.mark.parametrize("mask", EVERY, ids=str)
def test_the_band_is_the_predicate(mask: Mask) -> None:
    """The band in the words of the kernels' contract: causal, `window` keys with the query's own, its chunk's start."""
    band = mask.band()
    if band is None:
        assert isinstance(mask, Streaming), "it sees two intervals of keys"
        return
    for q in range(30):
        for k in range(30):
            inside = not band.causal or k <= q
            inside &= not band.window or k > q - band.window
            inside &= not band.chunk or k >= q // band.chunk * band.chunk
            assert inside == mask.allows(q, k), (q, k)


def test_features_of_a_band() -> None:
    assert Band(causal=True).features == {"causal"} and Band(causal=False).features == {"full"}
    assert Band(True, window=2).features == {"causal", "window"} and Band(True, chunk=2).features == {
        "causal",
        "chunk",
    }


@pytest.mark.parametrize("mask", EVERY, ids=str)
def test_masks_are_values(mask: Mask) -> None:
    """A spec is a key of dictionaries (plans, lowerings), so its mask must hash and compare by value."""
    again = dataclasses.replace(mask)  # type: ignore[type-var]
    assert again == mask and hash(again) == hash(mask)
    assert AttentionSpec(2, 1, 4, 4, 1.0, mask=again) in {AttentionSpec(2, 1, 4, 4, 1.0, mask=mask)}
    with pytest.raises(AttributeError):
        mask.size = 7  # type: ignore[attr-defined]


def test_sizes_tell_masks_apart() -> None:
    assert SlidingWindow(3) != SlidingWindow(4) and SlidingWindow(3) != Chunked(3) and Causal() != Full()


def test_build_by_name() -> None:
    assert {"causal", "chunked", "full", "sliding_window", "streaming"} <= {*masks.names()}
    assert masks.names() == tuple(sorted(masks.names()))
    assert masks.build("causal") == Causal() and masks.build("full") == Full()
    assert masks.build("sliding_window", 7) == SlidingWindow(7) and masks.build("chunked", 8) == Chunked(8)


def test_a_mask_outside_the_package_has_no_name() -> None:
    class Elsewhere(Causal):
        name = "elsewhere"

    class AlsoElsewhere(Mask):
        name = "also_elsewhere"

    assert Elsewhere in Causal.__subclasses__() and AlsoElsewhere in Mask.__subclasses__()
    assert set(masks._registry.__wrapped__()) == set(masks.names())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "casual",
            None,
            r"name='casual' is unknown; choose one of .*causal, .*streaming",
        ),
        ("chunked", None, r"name=chunked needs size"),
        ("sliding_window", None, r"name=sliding_window needs size"),
        ("causal", 4, r"name=causal takes no size, got size=4"),
        ("full", 4, r"name=full takes no size"),
        ("chunked", 0, r"name=chunked needs size >= 1 token, got size=0"),
        ("sliding_window", -1, r"name=sliding_window needs size >= 1 token, got size=-1"),
    ],
)
def test_build_errors_say_what_would_work(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.build(name, size)


def test_a_spec_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"num_heads=6 must be a multiple of num_kv_heads=4"):
        AttentionSpec(6, 4, 64, 64, 1.0)


def test_specs_and_masks_load_without_torch() -> None:
    code = "import sys, fa_research.spec, fa_research.masks as m; m.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
