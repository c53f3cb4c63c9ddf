"""Sliding windows around the borders of kernels' tiles, on every backend.

Kernels read keys in tiles, and decide by tile where a mask is needed. A window that is no multiple of a tile, many new
tokens and a long context are needed to see a tile that was left out: vLLM's FA3 lets queries see later keys so
(experiments/fa3_windows); relatives are vLLM #17476, flashinfer #4972 and SGLang #31501.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from fa_research import backends
from fa_research.backends import BackendSettings
from fa_research.masks import SlidingWindow
from fa_research.spec import AttentionSpec
from tests.helpers import DEVICES, Scene, make_spec
from tests.semantics.coverage import coverage, marked, runnable
from tests.summary import Record

Shape = tuple[int, tuple[int, int]]  # head dim, (query heads, KV heads)

# Keys. Key tiles of the kernels are 32, 64, 80, 96, 128, 144 or 176 keys; those after the first line lie beyond two.
WINDOWS = {
    "cpu": (15, 16, 17, 31, 33),
    "cuda": (
        *(1, 63, 64, 65, 96, 127, 128, 129, 161),
        *(191, 193, 200, 254, 255, 256, 257, 300, 382, 383, 384, 385, 511, 512, 575, 1000, 2047, 2048),
    ),
}
COMPILES_EACH = {"flex", "jax", "triton"}  # compile for each window: each shape runs a share of the windows
HEADS = {"cpu": ((4, 2),), "cuda": ((4, 4), (4, 2), (8, 2), (6, 2), (16, 2))}
HEAD_DIMS = {"cpu": (64,), "cuda": (64, 96, 128, 256)}


def lens(window: int, device: str) -> tuple[tuple[int, int], ...]:
    """(prefix, new) tokens: the first query's window begins before, at and after the first key, and at several places
    of a tile; passes of one, a few and more new tokens than a tile has."""
    if device == "cpu":
        return ((max(window - 3, 0), 3), (window + 5, 20), (window + 1, 1))
    new = (1, 2, 5, 17, 64, 130, 200, 300)
    offsets = (-17, 0, 1, 40, 67, 93, 131, 190)
    return tuple((max(window + offset, 0), n) for offset, n in zip(offsets, new, strict=True))


def windows(name: str, device: str, shape: Shape) -> tuple[int, ...]:
    """Those that a shape runs; all are run by some shape."""
    if device == "cpu" or name not in COMPILES_EACH:
        return WINDOWS[device]
    head_dim, heads = shape
    shares = len(HEADS[device])
    return WINDOWS[device][(head_dim // 32 + HEADS[device].index(heads)) % shares :: shares]


def sizes(name: str, device: str) -> tuple[int, torch.dtype]:
    """Page size and dtype: the usual ones if the backend takes them, else its own."""
    cases, usual = coverage(name, device).cases, torch.float32 if device == "cpu" else torch.bfloat16
    case = min(cases, key=lambda case: (case.dtype is not usual, case.page_size != 16))
    return case.page_size, case.dtype


def spec(shape: Shape, window: int) -> AttentionSpec:
    head_dim, heads = shape
    return make_spec(heads, head_dim, SlidingWindow(window))


@cache
def refused(name: str, device: str) -> dict[Shape, dict[int, tuple[str, ...]]]:
    """For each head dim and number of heads, the windows that the backend refuses, and why."""
    if not (cases := coverage(name, device).cases):
        return {}
    page_size, dtype = sizes(name, device)
    backend = backends.create(name, BackendSettings(torch.device(device), dtype, page_size, 16384), ())
    own = {case.head_dim for case in cases}
    return {
        shape: {
            window: reasons
            for window in windows(name, device, shape)
            if (reasons := backend.lower(spec(shape, window)).reasons)
        }
        for shape in itertools.product(own.intersection(HEAD_DIMS[device]) or own, HEADS[device])
    }


def shapes(name: str, device: str) -> list[Shape]:
    """Those of which the backend takes some window."""
    found = sorted(refused(name, device).items())
    return [shape for shape, against in found if len(against) < len(windows(name, device, shape))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = {device: runnable(backends.names(), device) for device in WINDOWS}
    if "shape" in metafunc.fixturenames:
        found = {d: [(name, shape) for name in names[d] for shape in shapes(name, d)] for d in names}
        metafunc.parametrize(("name", "device", "shape"), marked(found))
    elif "one_shape" in metafunc.fixturenames:
        found = {d: [(name, shape) for name in names[d] for shape in shapes(name, d)[:1]] for d in names}
        metafunc.parametrize(("name", "device", "one_shape"), marked(found))
    else:
        metafunc.parametrize("name", backends.names())
        metafunc.parametrize("device", DEVICES)


def test_no_window_is_wrong(name: str, device: str, shape: Shape, record_property: Record) -> None:
    """Every window that is not refused, against the definition in float64."""
    record_property("case", f"windows, {name} on {device}")
    page_size, dtype = sizes(name, device)
    failed = []
    for window in windows(name, device, shape):
        if window in refused(name, device)[shape]:
            continue
        scene = Scene(spec(shape, window), lens(window, device), page_size, dtype, device)
        try:
            scene.check(scene.backend(name), lse=False)
        except AssertionError:
            failed.append(window)
    assert not failed, f"wrong: {failed}; refused: {list(refused(name, device)[shape])}"


def test_what_is_covered(name: str, device: str, record_property: Record) -> None:
    found = coverage(name, device)
    if found.unavailable:
        record_property("coverage", [found.title, 0, str(found)])
        return
    against = refused(name, device)
    asked = sum(len(windows(name, device, shape)) for shape in against)
    count = asked - sum(map(len, against.values()))
    reasons = dict.fromkeys(reason for each in against.values() for why in each.values() for reason in why)
    said = f"{count} of {asked} windows"
    said += f"; refused: {'; '.join(reasons)}" if reasons else ""
    record_property("coverage", [f"windows, {found.title}", len(shapes(name, device)), said])


def test_full_attention_over_a_window_that_is_longer_than_the_context(
    name: str, device: str, one_shape: Shape
) -> None:
    """A window that nothing is outside of is no reason to refuse or to err."""
    lens = ((40, 30), (0, 7), (63, 1))
    scene = Scene(spec(one_shape, 4096), lens, *sizes(name, device), device)
    scene.check(scene.backend(name), lse=False)
