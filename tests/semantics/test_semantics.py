"""Every backend, on every mask, page size and ragged batch, against the definition in float64.

A backend is tested here because it exists: nothing below names one. It is tested on what it supports; the summary at
the end of the run says what that leaves out, and why (`tests/summary.py`).
"""

from __future__ import annotations

import itertools

import pytest

from fa_research import backends, masks
from fa_research.batch import ForwardMode
from tests.helpers import DEVICES
from tests.semantics.cases import Case, dimensions
from tests.semantics.coverage import coverage, parameters
from tests.summary import Record

MODES = {
    "extend": ForwardMode.EXTEND,
    "prefix": ForwardMode.EXTEND,
    "mixed": ForwardMode.MIXED,
    "decode": ForwardMode.DECODE,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = backends.names()
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(("name", "device", "case"), parameters(names))
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)
        metafunc.parametrize("device", DEVICES)


def test_matches_the_definition(name: str, device: str, case: Case, record_property: Record) -> None:
    record_property("case", f"{name} on {device}")
    scene = case.scene(device)
    backend = scene.backend(name)
    assert scene.batch().mode is MODES[case.batch]
    lse = bool(case.softcap) != case.has_sink  # half of the cases: interpreting and compiling take long
    scene.check(backend, lse=lse)


def test_what_is_covered(name: str, device: str, record_property: Record) -> None:
    """A lowering that refused everything would have no case, and nothing to fail. A backend of this package serves
    every mask that its kernel can say: bands, and any mask if it evaluates predicates."""
    found = coverage(name, device)
    record_property("coverage", [found.title, len(found.cases), str(found)])
    if found.capabilities is None:
        return
    assert found.cases, f"{name} runs here, but supports none of what is tested: {found}"
    if not backends._registry()[name].__module__.startswith("fa_research."):
        return
    any_mask = "predicate" in found.capabilities.mask_features
    for mask in dimensions(device)["mask"]:
        own = type(mask).__module__.startswith(f"{masks.__name__}.")
        if own and (any_mask or mask.band() is not None):
            assert any(case.mask == mask for case in found.cases), f"{name} refuses mask {mask.name}: {found}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("complete", ["torch", "triton"])
def test_backends_that_refuse_nothing(complete: str, device: str) -> None:
    """torch, and triton of what is a band."""
    found, values = coverage(complete, device), dimensions(device)
    assert not found.unavailable, found
    if complete == "triton":
        values["mask"] = [mask for mask in values["mask"] if mask.band() is not None]
    for a, b in itertools.combinations(values, 2):
        have = {(getattr(case, a), getattr(case, b)) for case in found.cases}
        assert have == set(itertools.product(values[a], values[b])), (a, b)
