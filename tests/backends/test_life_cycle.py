"""What the base class does for every backend: metadata, static buffers, planning, dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.layer import PagedAttention
from fa_research.attention.lowering import Lowering
from fa_research.backends.torch_backend import TorchBackend
from fa_research.masks import Causal, Chunked, Mask, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import Capabilities
from tests.helpers import DEVICES, Scene, make_spec, no_synchronisation

MIXED = ((0, 6), (20, 1), (15, 18))
DECODE = ((14, 1), (15, 1), (40, 1), (3, 1))
SIZES = [
    pytest.param("cpu", 4),
    pytest.param("cuda", 16, marks=pytest.mark.gpu),
    pytest.param("cuda", 256, marks=pytest.mark.gpu),
]
NAMES = pytest.mark.parametrize("name", backends.names())


class Recorder(TorchBackend):
    """Writes down what the base class asks of it."""

    name = "recorder"

    def __init__(self, *args: Any) -> None:
        self.calls: list[Any] = []
        super().__init__(*args)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"float32"}),
            mask_features=frozenset({"causal", "window"}),
        )

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        self.calls.append(("plan", metadata.cache_seqlens_int32_B.tolist(), lowering))
        metadata.plans[lowering.spec] = len(self.calls)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        self.calls.append(("attend", call.metadata.q_len))
        return super().attend(call)


@pytest.mark.parametrize("decode", [False, True])
def test_a_pass_says_what_it_is(decode: bool) -> None:
    scene = Scene(make_spec(), DECODE if decode else MIXED, 4, torch.float32, decode=decode)
    backend = Recorder(scene.settings(), scene.specs)
    scene.run(backend)
    assert backend.calls[-1] == ("attend", 1 if decode else None)


def test_each_kind_of_layer_is_planned_once_a_pass() -> None:
    """Eight layers of three kinds; the chunked kind is planned on its own virtual requests."""
    scene = Scene(make_spec(), MIXED, 4, torch.float32)
    plain, window, chunked = make_spec(), make_spec(mask=SlidingWindow(5)), make_spec(mask=Chunked(8))
    backend = Recorder(scene.settings(), [plain, window, plain, chunked, window, plain, chunked, plain])
    for _ in range(2):
        backend.calls.clear()
        backend.init_forward_metadata(scene.batch(), scene.table)
        planned = {lowering: lens for _, lens, lowering in backend.calls}
        assert len(backend.calls) == len(planned) == 3
        assert [planned[backend.lowerings[i]] for i in (0, 1, 3)] == [
            [6, 21, 33],
            [6, 21, 33],
            [6, 5, 8, 8, 8, 1],
        ]
    metadata = backend.forward_metadata
    assert metadata is not None and set(metadata.plans) == {plain, window}


def test_captured_passes_plan_on_the_static_buffers() -> None:
    """In the capture for backends that plan on the device, and again before each replay for those that plan on the
    host: the same call, with the lengths of the step at hand and the buffers of the capture."""
    scene = Scene(make_spec(), DECODE, 4, torch.float32, decode=True)
    backend = Recorder(scene.settings(), scene.specs)
    state = backend.init_cuda_graph_state(5, 64)
    backend.init_forward_metadata_capture_cuda_graph(scene.batch(padding=1), scene.table, state)
    assert backend.calls == [("plan", [15, 16, 41, 4, 1], backend.lowerings[0])]
    captured = backend.forward_metadata
    backend.init_forward_metadata_replay_cuda_graph(scene.batch([2, 0]), scene.table, state)
    assert backend.calls[1:] == [("plan", [41, 15], backend.lowerings[0])]
    replayed = backend.forward_metadata
    assert captured is not None and replayed is not None
    assert captured.page_table_BP.data_ptr() == replayed.page_table_BP.data_ptr()
    assert captured.cache_seqlens_int32_B.data_ptr() == replayed.cache_seqlens_int32_B.data_ptr()


def test_order_of_calls_is_checked() -> None:
    scene = Scene(make_spec(), DECODE, 4, torch.float32, decode=True)
    backend = backends.create("torch", scene.settings(), scene.specs)
    with pytest.raises(AssertionError, match="init_forward_metadata comes first"):
        scene.lse(backend)


@NAMES
@pytest.mark.parametrize(("device", "page_size"), SIZES)
@pytest.mark.parametrize("mask", [Causal(), Chunked(16)], ids=lambda mask: mask.name)
def test_static_buffers_serve_batches_of_other_sizes(
    name: str, device: str, page_size: int, mask: Mask
) -> None:
    """A long batch, then shorter and smaller ones with padding, in the buffers of captured steps: what the earlier
    batch left in the table is never read. Padded entries carry NaN and write it to page 0."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scene = Scene(make_spec((2, 1), mask=mask), DECODE, page_size, dtype, device, decode=True)
    backend = scene.backend(name)
    state = backend.init_cuda_graph_state(6, scene.cache.req_to_token.max_context_len)
    seen: set[int] = set()
    for which, padding in (([2, 1, 0, 3], 0), ([3, 0], 2), ([1], 0), ([0, 2, 3], 3)):
        scene.check_outputs(scene.run(backend, which, padding=padding, static=state), which)
        metadata = backend.forward_metadata
        assert metadata is not None and metadata.batch_size == len(which) + padding
        seen.add(metadata.page_table_BP.data_ptr())
    assert len(seen) == 1, "the buffers are the captured ones"


@NAMES
def test_one_pass_of_metadata_serves_every_layer(name: str) -> None:
    """Layers share the metadata, each reads its own keys."""
    scene = Scene(make_spec(), ((5, 3), (0, 4)), 4, torch.float32)
    backend = scene.backend(name)
    scene.run(backend)
    kv = scene.cache.kv
    kv.k(0).copy_(kv.k(1))
    kv.v(0).copy_(-kv.v(1))
    args = (scene.qkv()[0],)
    first = backend.forward(*args, kv.k(0), kv.v(0), backend.lowerings[0])[0]
    second = backend.forward(*args, kv.k(1), kv.v(1), backend.lowerings[1])[0]
    torch.testing.assert_close(first, -second)


@NAMES
@pytest.mark.parametrize(("device", "page_size"), SIZES[1:])
def test_an_eager_decode_waits_for_nothing(name: str, device: str, page_size: int) -> None:
    """From metadata to output: the host asks the device nothing (but for the oracle, which reads the lengths)."""
    if name == "torch":
        pytest.skip("torch reads lengths on the host, and says so: it is never captured")
    scene = Scene(make_spec(), DECODE, page_size, torch.bfloat16, device, decode=True)
    backend = scene.backend(name)
    batch, qkv = scene.batch(), scene.qkv()
    scene.run(backend)  # compiles
    args = (qkv[0], scene.cache.kv.k(1), scene.cache.kv.v(1), backend.lowerings[1])
    with no_synchronisation():
        backend.init_forward_metadata(batch, scene.table)
        backend.forward(*args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [((40, 1), (3, 1)), ((40, 9), (0, 20))], ids=["decode", "extend"])
@pytest.mark.parametrize("name", backends.names())
def test_all_planning_is_in_plan(name: str, lens: tuple[tuple[int, int], ...], device: str) -> None:
    """What attention plans for itself is missing from `metadata_us`. In the first pass a backend may learn the size of
    the pool."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scene = Scene(make_spec((4, 2), 64), lens, 16, dtype, device, decode=lens[0][1] == 1)
    backend = scene.backend(name)
    scene.run(backend)
    batch = scene.batch()
    metadata = backend.init_forward_metadata(batch, scene.table)
    planned = dict(metadata.plans)
    attend = PagedAttention(backend, scene.cache.kv, batch, backend.lowerings)
    attend(scene.layer_id, *scene.qkv(), rope=None, sinks_H=None)
    assert {key: id(value) for key, value in metadata.plans.items()} == {
        key: id(value) for key, value in planned.items()
    }
