"""Sliding windows around the borders of kernels' tiles, on every backend.

Kernels read keys in tiles, and decide by tile where a mask is needed. A window that is no multiple of a tile, many new
tokens and a long context are needed to see a tile that was left out: vLLM's FA3 lets queries see later keys so
(experiments/fa3_windows); relatives are vLLM #17476, flashinfer #4972 and SGLang #31501.
"""

from __future__ import annotations

import pytest
import torch

from fa_research import backends
from fa_research.masks import SlidingWindow
from tests.helpers import DEVICES, Scene, make_spec

# Keys. Key tiles of the kernels are 32, 64, 80, 96, 128, 144 or 176 keys; those after the first line lie beyond two.
WINDOWS = {
    "cpu": (15, 16, 17, 31, 33),
    "cuda": (
        *(1, 63, 64, 65, 96, 127, 128, 129, 161),
        *(191, 193, 200, 254, 255, 256, 257, 300, 382, 383, 384, 385, 511, 512, 575, 1000, 2047, 2048),
    ),
}
FEW = (100, 128, 255, 300, 2047)  # for backends that compile for each window
COMPILES_EACH = {"flex", "jax"}
HEADS = {"cpu": ((4, 2),), "cuda": ((4, 4), (4, 2), (8, 2), (6, 2), (16, 2))}
HEAD_DIMS = {"cpu": (64,), "cuda": (64, 96, 128, 256)}
CASES = [
    pytest.param(device, head_dim, heads, id=f"{device}-d{head_dim}-h{heads[0]}:{heads[1]}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for head_dim in HEAD_DIMS[device]
    for heads in HEADS[device]
]


def lens(window: int, device: str) -> tuple[tuple[int, int], ...]:
    """(prefix, new) tokens: the first query's window begins before, at and after the first key, and at several places
    of a tile; passes of one, a few and more new tokens than a tile has."""
    if device == "cpu":
        return ((max(window - 3, 0), 3), (window + 5, 20), (window + 1, 1))
    new = (1, 2, 5, 17, 64, 130, 200, 300)
    offsets = (-17, 0, 1, 40, 67, 93, 131, 190)
    return tuple((max(window + offset, 0), n) for offset, n in zip(offsets, new, strict=True))


def wrong(name: str, device: str, head_dim: int, heads: tuple[int, int]) -> tuple[list[int], list[str]]:
    """Windows with outputs outside the tolerance of the definition in float64, and those that were refused."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    windows = FEW if device == "cuda" and name in COMPILES_EACH else WINDOWS[device]
    failed, refused = [], []
    for window in windows:
        scene = Scene(
            make_spec(heads, head_dim, SlidingWindow(window)), lens(window, device), 16, dtype, device
        )
        if backends.reasons_against(name, scene.settings(), scene.specs):
            refused.append(f"{window}")
            continue
        try:
            scene.check(scene.backend(name), lse=False)
        except AssertionError:
            failed.append(window)
    if len(refused) == len(windows):
        pytest.skip(f"{name} runs none of these windows here")
    return failed, refused


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize(("device", "head_dim", "heads"), CASES)
def test_no_window_is_wrong(name: str, device: str, head_dim: int, heads: tuple[int, int]) -> None:
    failed, refused = wrong(name, device, head_dim, heads)
    assert not failed, f"wrong: {failed}; refused: {refused}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", backends.names())
def test_full_attention_over_a_window_that_is_longer_than_the_context(name: str, device: str) -> None:
    """A window that nothing is outside of is no reason to refuse or to err."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scene = Scene(make_spec((4, 2), 64, SlidingWindow(4096)), ((40, 30), (0, 7), (63, 1)), 16, dtype, device)
    scene.check(scene.backend(name), lse=False)
