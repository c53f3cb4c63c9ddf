"""Every backend, on every mask, page size and ragged batch, against the definition in float64.

A backend is tested here because it exists: nothing below names one. What a backend cannot do is skipped with its own
reasons.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.batch import ForwardMode
from tests.helpers import DEVICES
from tests.semantics.cases import CASES, DIMENSIONS, Case

MODES = {
    "extend": ForwardMode.EXTEND,
    "prefix": ForwardMode.EXTEND,
    "mixed": ForwardMode.MIXED,
    "decode": ForwardMode.DECODE,
}
ON_DEVICE = [
    pytest.param(device, case, id=f"{device}-{case}", marks=pytest.mark.gpu if device == "cuda" else ())
    for device, cases in CASES.items()
    for case in cases
]


def reasons_against(name: str, device: str, case: Case) -> tuple[str, ...]:
    settings = backends.BackendSettings(
        torch.device(device), case.dtype, case.page_size, max_context_len=16384
    )
    return backends.reasons_against(name, settings, [case.spec])


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize(("device", "case"), ON_DEVICE)
def test_matches_the_definition(name: str, device: str, case: Case) -> None:
    scene = case.scene(device)
    backend = scene.backend(name)
    assert scene.batch().mode is MODES[case.batch]
    lse = bool(case.softcap) != case.has_sink  # half of the cases: interpreting and compiling take long
    scene.check(backend, lse=lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", backends.names())
def test_a_backend_that_is_available_runs_some_cases(name: str, device: str) -> None:
    """A lowering that refused everything would pass by skipping."""
    settings = backends.BackendSettings(torch.device(device), torch.float16, 16, 16384)
    unavailable = backends.reasons_against(name, settings, [])
    if unavailable:
        pytest.skip(f"{name}: {'; '.join(unavailable)}")
    ran = [case for case in CASES[device] if not reasons_against(name, device, case)]
    for mask in DIMENSIONS[device]["mask"]:
        assert sum(case.mask == mask for case in ran) >= 2, f"{name} refuses mask {mask.name}"
    for batch in DIMENSIONS[device]["batch"]:
        assert sum(case.batch == batch for case in ran) >= 2, f"{name} has no case for batch {batch}"
    if name in ("torch", "triton"):
        assert len(ran) == len(CASES[device])


@pytest.mark.parametrize("device", list(CASES))
def test_each_pair_of_values_is_among_the_cases(device: str) -> None:
    dimensions: dict[str, Any] = DIMENSIONS[device]
    rows = [{name: getattr(case, name) for name in dimensions} for case in CASES[device]]
    for a, b in itertools.combinations(dimensions, 2):
        have = {(row[a], row[b]) for row in rows}
        assert have == set(itertools.product(dimensions[a], dimensions[b])), (a, b)
