"""`flashinfer` with its real kernels on a GPU, captured and not; on a CPU the same tests run with the stand-in.

What compiles takes minutes: all of these take the same few, for 16 bit and head dim 128.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa_research.backends.flashinfer import FlashInferBackend
from fa_research.batch import ForwardMode
from fa_research.config import GraphMode
from fa_research.engine.attention_stack import AttentionStack
from fa_research.masks import Causal, Chunked, Mask
from fa_research.spec import AttentionSpec
from tests.backends.flashinfer_stand_in import FlashInferOnCPU, install
from tests.engine.lab import FLASHINFER, PADDED, Place, places
from tests.gpu.test_known_failures_gpu import StackLab
from tests.helpers import Scene, make_spec, no_synchronisation


def stack_lab(place: Place, page_size: int = 16, mask: Mask | None = None) -> StackLab:
    on_cpu = place.device == "cpu"
    make = FlashInferOnCPU if on_cpu else None
    return StackLab(place, 200 if on_cpu else 9000, 4, mask=mask, page_size=page_size, make_backend=make)


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the place is a CPU."""
    if request.getfixturevalue("place").device == "cpu":
        install(monkeypatch)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("mask", [Causal(), Chunked(128)], ids=lambda mask: mask.name)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("place", places(PADDED, FLASHINFER))
def test_replays_equal_eager_steps(place: Place, page_size: int, mask: Mask) -> None:
    """Captured on padding, replayed from short to long and back, by two runners in turns: lengths of one split and of
    many."""
    lab = stack_lab(place, page_size, mask)
    wide, narrow = lab.decoder(place.mode, 1, 4), lab.decoder(place.mode, 2)
    eager = lab.decoder(GraphMode.off)
    last = lab.longest
    for lens in ([1, 2, 3], [last, 5, 131], [last - 1], [17, last, 128, 129], [2], [last // 2, 1, last]):
        for runner, batch in ((wide, lens), (narrow, lens[-2:])):
            outs, expected = lab.step(runner, batch), lab.step(eager, batch)
            lab.check(outs, batch)
            torch.testing.assert_close(outs, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("place", places(PADDED, FLASHINFER))
def test_a_step_plans_once_and_waits_for_nothing(place: Place) -> None:
    """Also where the host is so far ahead of the device that more steps are planned than there are pinned buffers."""
    lab = stack_lab(place)
    lens, steps = (21, 4, 120), 60
    decoder = lab.decoder(place.mode, 4)
    for request, seq_len in zip(lab.requests, lens, strict=False):
        request.seq_len = seq_len
    decoder.start(lab.requests[:3], [0] * 3)
    assert isinstance(lab.backend, FlashInferBackend)
    planned: list[tuple[int, ...]] = []
    original = lab.backend._plan_decode

    def note(wrapper: Any, metadata: Any, spec: AttentionSpec) -> None:
        planned.append(metadata.seq_lens_cpu)
        original(wrapper, metadata, spec)

    lab.backend._plan_decode = note  # type: ignore[method-assign]
    with no_synchronisation():
        if place.device == "cuda":
            torch.cuda._sleep(1_000_000_000)  # about half a second
        for _ in range(steps):
            decoder.step()
    assert planned == [tuple(n + step for n in lens) + (1,) for step in range(1, steps + 1)]
    stack = decoder.runner.model
    assert isinstance(stack, AttentionStack)
    lab.check(stack.outputs[ForwardMode.DECODE, 4][0][:3], [n + steps for n in lens])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"tensor_cores": True}, {"tensor_cores": False}, {"implementation": "fa2"}], ids=str
)
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_options(options: dict[str, Any], decode: bool) -> None:
    lens = ((500, 1), (0, 1), (3000, 1)) if decode else ((0, 300), (640, 129), (0, 1))
    scene = Scene(make_spec((8, 2), 128), lens, 16, torch.bfloat16, "cuda", decode=decode)
    scene.check(scene.backend("flashinfer", options=options))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1])
def test_one_split_in_a_captured_batch_size(num_splits: int) -> None:
    """Without splits the grid of a captured step is larger than the batch, and nothing marks what is past it."""
    lens = ((500, 1), (0, 1), (3000, 1), (63, 1))
    scene = Scene(make_spec((8, 2), 128), lens, 16, torch.bfloat16, "cuda", decode=True)
    backend = scene.backend("flashinfer", num_splits=num_splits)
    state = backend.init_cuda_graph_state(8, scene.cache.req_to_token.max_context_len)
    for which, padding in (([2, 1, 0, 3], 0), ([3], 1), ([0, 2, 3], 5), ([1, 0, 2, 3], 0)):
        scene.check_outputs(scene.run(backend, which, padding=padding, static=state), which)
