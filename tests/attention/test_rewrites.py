"""Rewrites on real data: a backend that has neither chunks nor sinks nor predicates must still be exact."""

from __future__ import annotations

import pytest
import torch

from fa_research import backends
from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Kind
from fa_research.attention.reference import paged_attention
from fa_research.backends.torch_backend import TorchBackend
from fa_research.batch import ForwardMode
from fa_research.errors import Unsupported
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec, Capabilities
from tests.helpers import DEVICES, Scene, decode_batch, make_spec

LENS = {
    "extend": ((0, 2), (0, 16), (0, 33), (0, 150)),
    "prefix": ((16, 5), (31, 9), (3, 30), (127, 130)),
    "mixed": ((0, 6), (20, 1), (15, 18), (128, 1), (250, 20)),
    "decode": ((0, 1), (15, 1), (16, 1), (127, 1), (128, 1), (300, 1)),
}
MODES = pytest.mark.parametrize("batch", LENS)


class BandTorch(TorchBackend):
    """The torch backend with the abilities of FA2: it refuses what such a kernel could not evaluate. It lives outside
    the package, so the registry does not know it."""

    name = "band_torch"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset({"float16", "float32", "float64"}),
            mask_features=frozenset({"causal", "full", "window"}),
            returns_lse=True,
        )

    def attend(self, call: AttentionCall) -> AttentionOutput:
        band = call.spec.mask.band()
        assert band is not None and not band.chunk and not call.spec.softcap
        assert call.sinks_H is None and not call.spec.has_sink
        return super().attend(call)


def run(
    spec: AttentionSpec, page_size: int, batch: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> BandTorch:
    scene = Scene(spec, LENS[batch], page_size, dtype, device, decode=batch == "decode")
    backend = BandTorch(scene.settings(), scene.specs)
    scene.check(backend)
    return backend


@MODES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("chunk", "page_size"), [(16, 1), (16, 16), (32, 16), (128, 128), (256, 128), (1000, 1)]
)
@pytest.mark.parametrize("has_sink", [False, True], ids=["plain", "sink"])
def test_chunks_as_requests(chunk: int, page_size: int, batch: str, has_sink: bool, device: str) -> None:
    backend = run(make_spec(mask=Chunked(chunk), has_sink=has_sink), page_size, batch, device)
    rewrites = ("chunks_as_requests", "sink_epilogue") if has_sink else ("chunks_as_requests",)
    assert backend.lowerings[1].rewrites == rewrites
    assert backend.lowerings[0].kind is Kind.NATIVE


@MODES
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(7), Full()], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sink_epilogue(mask: Mask, batch: str, dtype: torch.dtype) -> None:
    backend = run(make_spec((6, 2), mask=mask, has_sink=True), 3, batch, dtype=dtype)
    assert backend.lowerings[1].rewrites == ("sink_epilogue",)


@MODES
def test_layers_with_different_chunks_share_one_pass(batch: str) -> None:
    """The metadata is cut once for each chunk size, and each layer takes its own."""
    scene = Scene(make_spec(mask=Chunked(16)), LENS[batch], 16, torch.float32, decode=batch == "decode")
    short, long = scene.spec, make_spec(mask=Chunked(64))
    backend = BandTorch(scene.settings(), [long, short, make_spec()])
    scene.check(backend)
    assert backend.lowerings[0].chunk == 64
    args = (scene.qkv()[0], scene.cache.kv.k(1), scene.cache.kv.v(1))
    for spec, lowering in zip((long, short, make_spec()), backend.lowerings, strict=True):
        out, _ = backend.forward(*args, lowering)
        metadata = backend.forward_metadata
        assert metadata is not None
        lens = (metadata.cache_seqlens_int32_B.tolist(), metadata.cu_seqlens_q_B1.diff().tolist())
        exact, _ = paged_attention(
            *args, metadata.page_table_BP, *lens, 16, spec, compute_dtype=torch.float64
        )
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_decode_step_in_static_buffers_is_cut_anew() -> None:
    """The captured form: static metadata, and requests that cross a chunk border between two steps."""
    scene = Scene(make_spec(mask=Chunked(16)), ((14, 1), (15, 1), (31, 1)), 4, torch.float32, decode=True)
    backend = BandTorch(scene.settings(), scene.specs)
    state = backend.init_cuda_graph_state(8, scene.cache.req_to_token.max_context_len)
    rows = [request.row for request in scene.requests]
    for step in range(3):
        scene.cache.extend(scene.requests, [1] * 3)
        lens = [prefix + step for prefix, _ in scene.lens]
        batch = decode_batch(scene.table, rows, lens, scene.cache.req_to_token.max_context_len)
        assert batch.mode is ForwardMode.DECODE
        backend.init_forward_metadata_capture_cuda_graph(batch, scene.table, state)
        chunked = backend._chunked[16]
        assert chunked.cache_seqlens_int32_B.tolist() == [n % 16 + 1 for n in lens]


@pytest.mark.parametrize(("chunk", "page_size"), [(24, 16), (16, 3), (64, 128)])
def test_a_chunk_that_the_page_size_does_not_divide(chunk: int, page_size: int) -> None:
    scene = Scene(make_spec(mask=Chunked(chunk)), ((0, 4),), page_size, torch.float32)
    lowering = BandTorch(scene.settings(), scene.specs).lowerings[1]
    assert lowering.kind is Kind.UNSUPPORTED
    error = str(Unsupported(BandTorch.name, lowering.reasons, ["torch"]))
    assert f"kv.page_size={page_size} does not divide" in error and "would work here: torch" in error


def test_softcap_and_predicates_are_refused_and_not_dropped() -> None:
    scene = Scene(make_spec(softcap=5.0), ((0, 4),), 4, torch.float32)
    assert any(
        "softcap" in reason for reason in BandTorch(scene.settings(), scene.specs).lowerings[1].reasons
    )


def test_the_registry_knows_the_package_only() -> None:
    assert BandTorch.name not in backends.names()
