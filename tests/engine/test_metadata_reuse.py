"""`backend.metadata=per_layer`: metadata made for each layer changes no bit of a result, only what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fa_research import backends
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.backends.torch_backend import TorchBackend
from fa_research.config import CudaGraphConfig, GraphMode, MetadataReuse, to_plain
from fa_research.engine.cuda_graph import resolve_graph_mode
from fa_research.errors import ConfigError
from fa_research.masks import Causal, Chunked, Mask, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.runner import run_cell
from fa_research.spec import AttentionSpec, Capabilities
from fa_research.tracking import Status
from tests.engine.lab import (
    EAGER,
    FA3,
    INTERPRETED,
    PADDED,
    TRITON,
    TRITON_EAGER,
    Lab,
    Place,
    decode,
    places,
    prompts_of,
)
from tests.workloads.cells import build, cell

LAYERS = 3


class Planner(TorchBackend):
    """The torch backend, which counts how often it plans, and attends with nothing that an earlier pass left."""

    name = "planner"
    plans = 0

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        self.plans += 1
        metadata.plans[lowering.spec] = self.plans

    def attend(self, call: AttentionCall) -> AttentionOutput:
        assert call.metadata.plans[call.spec] == self.plans, "not the newest plan"
        return super().attend(call)


def per_layer(place: Place, cls: type[AttentionBackend] | None = None, mask: Mask | None = None) -> Lab:
    def make(settings: BackendSettings, specs: Sequence[AttentionSpec]) -> AttentionBackend:
        settings = dataclasses.replace(settings, metadata_per_layer=True)
        return cls(settings, specs) if cls else backends.create(place.backend, settings, specs)

    return Lab(place, num_layers=LAYERS, make_backend=make, mask=mask or Causal())


def sequences(lab: Lab) -> list[torch.Tensor]:
    """Logits of a prefill and of steps after it, in batches that are padded where steps are; where kernels are
    interpreted, fewer steps, the first of which begins a chunk."""
    prompts, steps = (prompts_of(16, 4, 19), 2) if lab.place is INTERPRETED else (prompts_of(21, 4, 33), 7)
    requests, first = lab.prefill(prompts)
    return decode(lab.decoder(1, 2, 4), requests, prompts, first, steps).logits


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(9), Chunked(16)], ids=lambda mask: mask.name)
@pytest.mark.parametrize("place", places(EAGER, PADDED, INTERPRETED, FA3, TRITON, TRITON_EAGER))
def test_results_are_the_same_bit_for_bit(place: Place, mask: Mask) -> None:
    shared = sequences(Lab(place, num_layers=LAYERS, mask=mask))  # skips where the backend cannot
    for alone, expected in zip(sequences(per_layer(place, mask=mask)), shared, strict=True):
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("place", [EAGER, PADDED], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["per_layer", "shared"])
def test_each_layer_plans_once(place: Place, alone: bool) -> None:
    lab = per_layer(place, Planner) if alone else Lab(place, num_layers=LAYERS, make_backend=Planner)
    assert isinstance(lab.backend, Planner)
    requests, first = lab.prefill(prompts_of(9, 3))
    assert lab.backend.plans == (LAYERS if alone else 1)
    decoder = lab.decoder(2)
    decoder.start(requests, first.argmax(-1))
    for _ in range(2):
        before = lab.backend.plans
        decoder.step()
        assert lab.backend.plans - before == (LAYERS if alone else 1)


def test_a_plan_of_the_host_is_not_captured_per_layer() -> None:
    can = Capabilities(frozenset({"cuda"}), frozenset(), frozenset(), host_planning=True)
    cuda = torch.device("cuda")

    def resolve(mode: GraphMode, alone: bool) -> GraphMode:
        return resolve_graph_mode(CudaGraphConfig(mode), cuda, can, "planner", metadata_per_layer=alone)

    assert resolve(GraphMode.auto, False) is resolve(GraphMode.on, False) is GraphMode.on
    assert resolve(GraphMode.auto, True) is GraphMode.off
    with pytest.raises(ConfigError, match=r"cuda_graph.mode=off or backend.metadata=shared"):
        resolve(GraphMode.on, True)


@pytest.mark.parametrize("workload", ["decode", "extend"])
def test_the_key_reaches_the_backend_and_the_row(workload: str, tmp_path: Path) -> None:
    config = cell(workload)
    assert not build(config)[1].backend.settings.metadata_per_layer
    config.backend.metadata = MetadataReuse.per_layer
    assert build(config)[1].backend.settings.metadata_per_layer
    row = run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=True)
    assert row.status is Status.ok and row.config["backend"]["metadata"] == "per_layer"
