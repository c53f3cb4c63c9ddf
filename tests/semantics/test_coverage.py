"""What is generated for backends that take little, and what the end of a run says of them."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fa_research import backends, masks
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.backends.torch_backend import TorchBackend
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow, Streaming
from fa_research.spec import Capabilities
from tests.semantics.cases import every_mask
from tests.semantics.coverage import coverage
from tests.semantics.covering import covering

pytest_plugins = ["pytester"]

CAN = {"devices": frozenset({"cpu", "cuda"}), "mask_features": frozenset({"predicate"}), "returns_lse": True}


class OneDtype(TorchBackend):
    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=frozenset({"float32"}), softcap=True, sinks=True, **CAN)  # type: ignore[arg-type]


class OddSizes(TorchBackend):
    """Sizes that are in no dimension, bands alone, no chunks, no softcap."""

    @property
    def capabilities(self) -> Capabilities:
        can = {**CAN, "mask_features": frozenset({"causal", "window", "full"})}
        return Capabilities(
            dtypes=frozenset({"float64"}), head_dims=frozenset({72}), page_size_multiple=48, **can
        )  # type: ignore[arg-type]


class WrongOnce(OneDtype):
    """Wrong in one mask."""

    def attend(self, call: AttentionCall) -> AttentionOutput:
        out, lse = super().attend(call)
        return (out * 1.01 if isinstance(call.spec.mask, Streaming) else out), lse


class Raises(TorchBackend):
    @property
    def capabilities(self) -> Capabilities:
        raise RuntimeError("no kernel for you")


CONFTEST = "from tests.conftest import pytest_collection_modifyitems, pytest_terminal_summary"
TESTS = "from tests.semantics.test_semantics import *"


def test_backends_that_take_little(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct ones pass, a wrong one fails where it is wrong, and the summary says what was left out."""
    own = {"one_dtype": OneDtype, "odd_sizes": OddSizes, "wrong_once": WrongOnce, "raises": Raises}
    monkeypatch.setattr(backends, "_registry", lambda: own)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers =\n    gpu: needs a GPU")
    result = pytester.runpytest_inprocess(
        "-q", "-m", "not gpu", "-k", "matches or covered", "-p", "no:randomly"
    )
    failed = set(re.findall(r"^FAILED \S+::(\S+\[\S+\])", result.stdout.str(), re.MULTILINE))
    assert failed == {
        "test_what_is_covered[raises-cpu]",
        *(
            f"test_matches_the_definition[wrong_once-cpu-{case}]"
            for case in coverage("wrong_once", "cpu").cases
            if isinstance(case.mask, Streaming)
        ),
    }
    assert len(failed) > 4
    lines = {line.split(" on cpu: ")[0]: line for line in result.outlines if " on cpu: " in line}
    count = len(coverage("one_dtype", "cpu").cases)
    assert lines["one_dtype"] == (
        f"one_dtype on cpu: {count} of {count} cases ran; not tested: dtype float16 (dtype float16: takes float32)"
    )
    odd = {(case.page_size, case.head_dim, case.dtype) for case in coverage("odd_sizes", "cpu").cases}
    assert odd == {(48, 72, torch.float64), (96, 72, torch.float64)}
    for said in (
        "page_size 1, 3, 16, 128 (its own in their place: 48, 96)",
        "head_dim 64, 128, 256, 96, 40 (its own in their place: 72)",
        "dtype float32, float16 (its own in their place: float64)",
        "softcap 4.0 (softcap=4.0: the kernel has none)",
        "mask chunked12 (mask chunked: as virtual requests, chunks of 12 tokens must start on a page border",
        "mask streaming7 (mask streaming: it is no band",
    ):
        assert said in lines["odd_sizes"], lines["odd_sizes"]


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_what_is_possible(seed: int) -> None:
    """Every possible pair, every possible combination of the dimensions in full, and nothing that is refused."""
    draw = random.Random(seed)
    values = {"a": (1, 2, 3, 4), "b": (1, 2, 3), "free": "xyz", "c": (True, False), "d": (1, 2, 3, 4, 5)}
    names = [name for name in values if name != "free"]
    every = [
        dict(zip(names, row, strict=True)) for row in itertools.product(*(values[name] for name in names))
    ]
    supported = [row for row in every if draw.random() < (0.02, 0.1, 0.3, 0.7, 1.0)[seed]]
    rows = covering(values, ("b", "free"), supported)
    assert all({name: row[name] for name in names} in supported for row in rows)
    anything = [{**row, "free": value} for row in supported for value in "xyz"]
    for a, b in itertools.combinations(values, 2):
        assert {(row[a], row[b]) for row in rows} == {(row[a], row[b]) for row in anything}
    assert len(rows) < len(anything) or seed == 0
    assert covering(values, (), []) == []


@dataclass(frozen=True)
class Stride(Mask):
    """As a plugin may have it: fields without defaults."""

    size: int
    step: int
    name: ClassVar[str] = "stride"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & ((q_pos - k_pos < self.size) | (k_pos % self.step == 0))

    def band(self) -> None:
        return None


@dataclass(frozen=True)
class Unmade(Stride):
    name: ClassVar[str] = "unmade"

    def __post_init__(self) -> None:
        raise ValueError("step is to be a prime")


def test_masks_are_varied_by_existing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {**masks._registry(), "stride": Stride, "unmade": Unmade}
    monkeypatch.setattr(masks, "_registry", lambda: own)
    made, problems = every_mask.__wrapped__("cpu")
    assert {Causal(), Chunked(12), Full(), SlidingWindow(7), Streaming(7), Stride(7, 4)} <= {*made}
    assert problems == ("mask unmade: step is to be a prime; give its fields defaults that work",)
    assert set(made) - {Stride(7, 4)} == {case.mask for case in coverage("torch", "cpu").cases}
