"""`backend.options.gather=true`: the same semantics over keys and values that were copied out of their pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.attention.gather import OPTION
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.errors import ConfigError
from fa_research.masks import Chunked
from fa_research.spec import AttentionSpec
from tests.engine.lab import FA2, FA3, INTERPRETED, TRITON, TRITON_EAGER, Lab, Place, Session, places
from tests.helpers import DEVICES, Scene, make_spec
from tests.semantics.cases import LENS, Case
from tests.semantics.coverage import coverage, marked
from tests.summary import Record

GATHERED = ((OPTION, True),)
NAMES = [name for name in backends.names() if OPTION in backends._registry()[name].option_names]


def some(name: str, device: str) -> list[Case]:
    """Every mask on every batch once, page sizes in turns."""
    cases = coverage(name, device, GATHERED).cases
    sizes, found = sorted({case.page_size for case in cases}), []
    for mask, batch in dict.fromkeys((case.mask, case.batch) for case in cases):
        own = [case for case in cases if (case.mask, case.batch) == (mask, batch)]
        size = sizes[len(found) % len(sizes)]
        found.append(min(own, key=lambda case: abs(case.page_size - size)))  # noqa: B023
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = {device: [(name, case) for name in NAMES for case in some(name, device)] for device in LENS}
        metafunc.parametrize(("name", "device", "case"), marked(cases))
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)
        metafunc.parametrize("device", DEVICES)


def test_backends_that_can() -> None:
    assert {"fa2", "fa3", "triton"} <= set(NAMES)
    cases = some("triton", "cpu")
    assert len({(case.mask, case.batch) for case in cases}) == len(cases) == 16
    assert len({case.page_size for case in cases}) >= 3


def test_matches_the_definition(name: str, device: str, case: Case, record_property: Record) -> None:
    record_property("case", coverage(name, device, GATHERED).title)
    scene = case.scene(device)
    scene.check(scene.backend(name, options=dict(GATHERED)), lse=bool(case.softcap) != case.has_sink)


def test_what_is_covered(name: str, device: str, record_property: Record) -> None:
    found = coverage(name, device, GATHERED)
    record_property("coverage", [found.title, len(some(name, device)), str(found)])
    assert found.unavailable or found.cases


def test_padded_entries_are_nobodys(name: str, device: str) -> None:
    """Their keys are what lies in the sink page: NaN here, and beside the last request's in the buffer."""
    dtype = torch.float32 if name == "triton" and device == "cpu" else torch.bfloat16
    if coverage(name, device, GATHERED).unavailable:
        return  # the summary says so
    scene = Scene(make_spec(), ((0, 1), (40, 1), (17, 1)), 16, dtype, device, decode=True)
    backend = scene.backend(name, options=dict(GATHERED))
    state = backend.init_cuda_graph_state(6, scene.cache.req_to_token.max_context_len)
    for which, padding in (([2, 1, 0], 2), ([1], 0), ([0, 2], 3)):
        scene.check_outputs(scene.run(backend, which, padding=padding, static=state), which)


def make(place: Place) -> Any:
    def backend(settings: BackendSettings, specs: Sequence[AttentionSpec]) -> AttentionBackend:
        return backends.create(place.backend, dataclasses.replace(settings, options=dict(GATHERED)), specs)

    return backend


@pytest.mark.parametrize("chunk", [0, 32], ids=["causal", "chunked"])
@pytest.mark.parametrize("place", places(INTERPRETED, FA3, TRITON, TRITON_EAGER, FA2))
def test_decode_steps(place: Place, chunk: int) -> None:
    """Prefill, then captured (or padded) steps of batches that change, against one float64 pass over each sequence."""
    options: dict[str, Any] = {"mask": Chunked(chunk)} if chunk else {}
    Lab(place, page_size=16, **options)  # skips where the backend cannot
    lab = Lab(place, page_size=16, make_backend=make(place), **options)
    decoder = lab.decoder(1, 2, 4)
    session = Session(lab, (21, 4, 33))
    for which in ((0, 1, 2), (2,), (1, 0)):
        session.run(decoder, which, 2 if lab.device.type == "cpu" else 6)
    session.check()


def test_the_option_is_true_or_false() -> None:
    scene = Scene(make_spec(), ((0, 4),), 16, torch.float32)
    with pytest.raises(ConfigError, match=r"backend.options.gather=yes: must be true or false"):
        backends.create("triton", scene.settings(options={OPTION: "yes"}), scene.specs)
    with pytest.raises(ConfigError, match=r"backend.options.gather is unknown to backend=torch"):
        backends.create("torch", scene.settings(options={OPTION: True}), scene.specs)
