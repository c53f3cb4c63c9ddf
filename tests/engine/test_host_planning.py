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
from fa_research.attention.lowering import Lowering
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.backends.torch_backend import TorchBackend
from fa_research.backends.triton_backend import TritonBackend
from fa_research.batch import ForwardBatch
from fa_research.config import GraphMode
from fa_research.engine.decode import DecodeRunner
from fa_research.masks import Causal, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities
from tests.engine.lab import EAGER, PADDED, TRITON, Lab, Place, Session, places, prompts_of

CAUSAL = AttentionSpec(4, 2, 64, 64, 0.125)
SPECS = (CAUSAL, dataclasses.replace(CAUSAL, mask=SlidingWindow(9)), CAUSAL)


class _Planner(AttentionBackend):
    """Attends with the lengths that it planned, which come from the host; a stale plan is a wrong result."""

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        super().__init__(settings, specs)
        self.events: list[Any] = []
        self.lens: tuple[int, ...] = ()
        self.planned = {s: torch.zeros(8, dtype=torch.int32, device=settings.device) for s in set(specs)}

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, host_planning=True)

    def init_forward_metadata(self, batch: ForwardBatch, req_to_token_RW: Tensor) -> FlashAttentionMetadata:
        self.lens = batch.seq_lens_cpu
        return super().init_forward_metadata(batch, req_to_token_RW)

    def init_forward_metadata_capture_cuda_graph(
        self, batch: ForwardBatch, req_to_token_RW: Tensor
    ) -> FlashAttentionMetadata:
        self.lens = batch.seq_lens_cpu
        return super().init_forward_metadata_capture_cuda_graph(batch, req_to_token_RW)

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        if self.settings.device.type == "cuda":
            assert not torch.cuda.is_current_stream_capturing(), "planning became part of the graph"
        self.events.append((lowering.spec, self.lens))
        planned = self.planned[lowering.spec]
        planned[: len(self.lens)].copy_(torch.tensor(self.lens, dtype=torch.int32))

    def forward_decode(self, q_THD, k_cache_NKD, v_cache_NKV, metadata, spec, **options):  # type: ignore[no-untyped-def]
        self.events.append("attend")
        lens_B = self.planned[spec][: metadata.batch_size]
        metadata = dataclasses.replace(metadata, cache_seqlens_int32_B=lens_B, plans={})
        return super().forward_decode(q_THD, k_cache_NKD, v_cache_NKV, metadata, spec, **options)


class TorchPlanner(_Planner, TorchBackend):
    name = "torch_planner"


class TritonPlanner(_Planner, TritonBackend):
    name = "triton_planner"


def lab_of(place: Place) -> Lab:
    planner = TritonPlanner if place.backend == "triton" else TorchPlanner
    return Lab(place, num_layers=3, specs=SPECS, make_backend=planner)


def started(place: Place) -> tuple[Lab, DecodeRunner]:
    lab = lab_of(place)
    requests, first = lab.prefill(prompts_of(21, 4, 33))
    decoder = lab.decoder(2, 4)
    decoder.start(requests, first.argmax(-1))
    assert isinstance(lab.backend, _Planner)
    lab.backend.events.clear()
    return lab, decoder


@pytest.mark.parametrize("place", places(EAGER, PADDED, TRITON))
def test_results_are_right(place: Place) -> None:
    lab = lab_of(place)
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
        assert lab.backend.events[:2] == [(SPECS[0], lens), (SPECS[1], lens)]  # type: ignore[attr-defined]
        assert lab.backend.events[2:] == ["attend"] * 3  # type: ignore[attr-defined]
        lab.backend.events.clear()  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_a_replay_is_preceded_by_its_plans() -> None:
    lab, decoder = started(TRITON)
    for step in range(1, 8):
        decoder.step()
        lens = (21 + step, 4 + step, 33 + step, 1)
        assert lab.backend.events == [(SPECS[0], lens), (SPECS[1], lens)]  # type: ignore[attr-defined]
        lab.backend.events.clear()  # type: ignore[attr-defined]


def test_a_backend_that_plans_on_the_device_is_not_told_lengths() -> None:
    """Computing them would be host work in every step for nothing."""

    class Curious(TorchBackend):
        name = "curious"
        seen: list[tuple[int, ...]] = []

        def init_forward_metadata_capture_cuda_graph(self, batch, req_to_token_RW):  # type: ignore[no-untyped-def]
            self.seen.append(batch.seq_lens_cpu)
            return super().init_forward_metadata_capture_cuda_graph(batch, req_to_token_RW)

    lab = Lab(PADDED, make_backend=Curious)
    requests, first = lab.prefill(prompts_of(5))
    decoder = lab.decoder(1)
    decoder.start(requests, first.argmax(-1))
    decoder.step()
    assert Curious.seen == [()]


def test_test_backends_are_no_choice_for_users() -> None:
    assert not {"torch_planner", "triton_planner", "curious", "witness"} & set(backends.names())
    assert Causal() == SPECS[0].mask
