"""`backend.options.gather=true`: the same semantics over keys and values that were copied out of their pages."""

from __future__ import annotations

import dataclasses
import itertools
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
from tests.helpers import Scene, make_spec
from tests.semantics.cases import CASES, DIMENSIONS, LENS, Case

GATHERED = {"options": {OPTION: True}}
NAMES = [name for name in backends.names() if OPTION in backends._registry()[name].option_names]


def some(device: str) -> list[Case]:
    """Every mask on every batch once, page sizes in turns."""
    sizes, found = DIMENSIONS[device]["page_size"], []
    for n, (mask, batch) in enumerate(itertools.product(DIMENSIONS[device]["mask"], LENS[device])):
        own = [case for case in CASES[device] if (case.mask, case.batch) == (mask, batch)]
        found.append(min(own, key=lambda case: abs(case.page_size - sizes[n % len(sizes)])))  # noqa: B023
    return found


SOME = [
    pytest.param(device, case, id=f"{device}-{case}", marks=pytest.mark.gpu if device == "cuda" else ())
    for device in CASES
    for case in some(device)
]


def test_backends_that_can() -> None:
    assert {"fa2", "fa3", "triton"} <= set(NAMES)
    assert len({case.page_size for case in some("cpu")}) >= 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("device", "case"), SOME)
def test_matches_the_definition(name: str, device: str, case: Case) -> None:
    scene = case.scene(device)
    scene.check(scene.backend(name, **GATHERED), lse=bool(case.softcap) != case.has_sink)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padded_entries_are_nobodys(name: str, device: str) -> None:
    """Their keys are what lies in the sink page: NaN here, and beside the last request's in the buffer."""
    dtype = torch.float32 if name == "triton" and device == "cpu" else torch.bfloat16
    scene = Scene(make_spec(), ((0, 1), (40, 1), (17, 1)), 16, dtype, device, decode=True)
    backend = scene.backend(name, **GATHERED)
    state = backend.init_cuda_graph_state(6, scene.cache.req_to_token.max_context_len)
    for which, padding in (([2, 1, 0], 2), ([1], 0), ([0, 2], 3)):
        scene.check_outputs(scene.run(backend, which, padding=padding, static=state), which)


def make(place: Place) -> Any:
    def backend(settings: BackendSettings, specs: Sequence[AttentionSpec]) -> AttentionBackend:
        return backends.create(place.backend, dataclasses.replace(settings, **GATHERED), specs)  # type: ignore[arg-type]

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
