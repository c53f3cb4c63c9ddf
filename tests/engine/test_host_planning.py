"""The hook for backends that plan on the host (as FlashInfer does): `plan` runs outside the graph, before every step,
once for each kind of layer, and knows the lengths without asking the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research import backends
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends import AttentionBackend, BackendSettings, CudaGraphState
from fa_research.backends.torch_backend import TorchBackend
from fa_research.backends.triton_backend import TritonBackend
from fa_research.batch import ForwardBatch
from fa_research.config import GraphMode
from fa_research.engine.decode import DecodeRunner
from fa_research.masks import Chunked, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities
from tests.engine.lab import EAGER, PADDED, TRITON, Lab, Place, Session, places, prompts_of

CAUSAL = AttentionSpec(4, 2, 64, 64, 0.125)
LOCAL = dataclasses.replace(CAUSAL, mask=SlidingWindow(9))
CHUNKED = dataclasses.replace(CAUSAL, mask=Chunked(16))
SPECS = (CAUSAL, LOCAL, CAUSAL)


class _Planner(AttentionBackend):
    """Attends with the lengths that it planned, which come from the host; a stale plan is a wrong result. Plans lie in
    buffers of their own, made once, so that a captured graph finds the next one."""

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        super().__init__(settings, specs)
        self.events: list[Any] = []
        self.lens: tuple[int, ...] = ()
        device = settings.device
        self.planned = {low: torch.zeros(8, dtype=torch.int32, device=device) for low in self.lowerings}

    @property
    def capabilities(self) -> Capabilities:
        bands = frozenset({"causal", "full", "window"})  # chunks become virtual requests
        return dataclasses.replace(super().capabilities, host_planning=True, mask_features=bands)

    def init_forward_metadata(self, batch: ForwardBatch, req_to_token_RW: Tensor) -> FlashAttentionMetadata:
        self.lens = batch.seq_lens_cpu
        return super().init_forward_metadata(batch, req_to_token_RW)

    def init_forward_metadata_capture_cuda_graph(
        self, batch: ForwardBatch, req_to_token_RW: Tensor, state: CudaGraphState
    ) -> FlashAttentionMetadata:
        self.lens = batch.seq_lens_cpu
        return super().init_forward_metadata_capture_cuda_graph(batch, req_to_token_RW, state)

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        if self.settings.device.type == "cuda":
            assert not torch.cuda.is_current_stream_capturing(), "planning became part of the graph"
        self.events.append((lowering, self.lens))
        lens = [n - (n - 1) // lowering.chunk * lowering.chunk if lowering.chunk else n for n in self.lens]
        metadata.plans[lowering.spec] = planned = self.planned[lowering]
        planned[: len(lens)].copy_(torch.tensor(lens, dtype=torch.int32))

    def attend(self, call: AttentionCall) -> AttentionOutput:
        metadata = call.metadata
        if metadata.q_len != 1:
            return super().attend(call)
        self.events.append("attend")
        lens_B = metadata.plans[call.spec][: metadata.batch_size]
        metadata = dataclasses.replace(metadata, cache_seqlens_int32_B=lens_B, plans={})
        return super().attend(dataclasses.replace(call, metadata=metadata))


class TorchPlanner(_Planner, TorchBackend):
    name = "torch_planner"


class TritonPlanner(_Planner, TritonBackend):
    name = "triton_planner"


def lab_of(place: Place, specs: tuple[AttentionSpec, ...] = SPECS) -> Lab:
    planner = TritonPlanner if place.backend == "triton" else TorchPlanner
    return Lab(place, num_layers=len(specs), specs=specs, make_backend=planner)


def started(place: Place) -> tuple[Lab, DecodeRunner]:
    lab = lab_of(place)
    requests, first = lab.prefill(prompts_of(21, 4, 33))
    decoder = lab.decoder(2, 4)
    decoder.start(requests, first.argmax(-1))
    assert isinstance(lab.backend, _Planner)
    lab.backend.events.clear()
    return lab, decoder


@pytest.mark.parametrize("specs", [SPECS, (CAUSAL, CHUNKED)], ids=["window", "chunk"])
@pytest.mark.parametrize("place", places(EAGER, PADDED, TRITON))
def test_results_are_right(place: Place, specs: tuple[AttentionSpec, ...]) -> None:
    """Also where planning and virtual requests meet: then the plan is for those."""
    lab = lab_of(place, specs)
    decoder = lab.decoder(1, 2, 4)
    session = Session(lab, (21, 4, 33))
    for which in ((0, 1, 2), (2,), (1, 0)):
        session.run(decoder, which, 8)
    session.check()


@pytest.mark.parametrize("place", places(EAGER, PADDED))
def test_plans_come_once_a_step_and_kind_of_layer_before_anything_attends(place: Place) -> None:
    lab, decoder = started(place)
    padding = (1,) if place.mode is GraphMode.simulate else ()
    for step in range(1, 8):  # the host's own lengths are brought up to date only every five steps
        decoder.step()
        lens = (21 + step, 4 + step, 33 + step, *padding)
        assert lab.backend.events[:2] == [(low, lens) for low in lab.backend.lowerings[:2]]  # type: ignore[attr-defined]
        assert lab.backend.events[2:] == ["attend"] * 3  # type: ignore[attr-defined]
        lab.backend.events.clear()  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_a_replay_is_preceded_by_its_plans() -> None:
    lab, decoder = started(TRITON)
    for step in range(1, 8):
        decoder.step()
        lens = (21 + step, 4 + step, 33 + step, 1)
        assert lab.backend.events == [(low, lens) for low in lab.backend.lowerings[:2]]  # type: ignore[attr-defined]
        lab.backend.events.clear()  # type: ignore[attr-defined]


def test_a_backend_that_plans_on_the_device_is_not_told_lengths() -> None:
    """Computing them would be host work in every step for nothing."""

    class Curious(TorchBackend):
        name = "curious"
        seen: list[tuple[int, ...]] = []

        def init_forward_metadata_capture_cuda_graph(self, batch, *args):  # type: ignore[no-untyped-def]
            self.seen.append(batch.seq_lens_cpu)
            return super().init_forward_metadata_capture_cuda_graph(batch, *args)

    lab = Lab(PADDED, make_backend=Curious)
    requests, first = lab.prefill(prompts_of(5))
    decoder = lab.decoder(1)
    decoder.start(requests, first.argmax(-1))
    decoder.step()
    assert Curious.seen == [()]


def test_test_backends_are_no_choice_for_users() -> None:
    assert not {"torch_planner", "triton_planner", "curious", "witness"} & set(backends.names())
