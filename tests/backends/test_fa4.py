"""`fa4`: what it says of itself and what it asks of the kernels; on a GPU, the kernels themselves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.attention.call import AttentionCall
from fa_research.attention.lowering import Kind
from fa_research.attention.merge import apply_sinks
from fa_research.backends import BackendSettings, fa4
from fa_research.backends.fa4 import FA4Backend
from fa_research.errors import BackendUnavailable
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec
from tests.backends.replays import check_replays
from tests.helpers import Scene, make_spec


def settings(dtype: torch.dtype = torch.bfloat16, page_size: int = 16, **more: Any) -> BackendSettings:
    return BackendSettings(torch.device("cuda"), dtype, page_size, max_context_len=4096, **more)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every kernel call, in a package that stands where the real one is not: what is tested is what
    we say and ask, and no result."""
    told: list[dict[str, Any]] = []

    def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> Any:
        told.append({**named, "k": k, "v": v})
        return torch.ones_like(q), torch.zeros(q.shape[1], q.shape[0]) if named["return_lse"] else None

    monkeypatch.setattr(
        fa4, "load", lambda: (SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func), None)
    )
    return told


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_without_a_gpu_it_says_so_and_what_would_work() -> None:
    with pytest.raises(
        BackendUnavailable, match="backend=fa4 is not available here: needs an NVIDIA Hopper GPU"
    ) as error:
        backends.create("fa4", replace(settings(), device=torch.device("cpu")), [make_spec()])
    assert "torch" in error.value.alternatives


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4.importlib, "import_module", lambda name: __import__("no_such_package"))
    module, reason = fa4.load.__wrapped__()
    assert module is None
    assert reason == "flash_attn.cute: No module named 'no_such_package' (pip install -e \".[fa4]\")"


@pytest.mark.parametrize(
    ("spec", "asked", "reason"),
    [
        (
            make_spec(head_dim=128),
            {"num_splits": 4},
            "backend.num_splits=4: its Hopper kernels have one split",
        ),
        (make_spec(head_dim=96, mask=Full()), {}, "mask full with head dim 96: its tile is 144 keys"),
        (make_spec(head_dim=256), {}, "head dim 256: takes 64, 96, 128"),
        (make_spec(), {"dtype": torch.float32}, "dtype float32: takes float16, bfloat16"),
        (make_spec(mask=Chunked(24)), {}, "mask chunked: as virtual requests"),
    ],
)
def test_what_it_refuses(calls: list[Any], spec: AttentionSpec, asked: dict[str, Any], reason: str) -> None:
    (lowering,) = FA4Backend(settings(**asked), [spec]).lowerings
    assert len(lowering.reasons) == 1 and lowering.reasons[0].startswith(reason)


@pytest.mark.parametrize(
    ("spec", "asked", "kind", "rewrites"),
    [
        (make_spec(), {"num_splits": 1, "deterministic": True}, Kind.NATIVE, ()),
        (make_spec(head_dim=96, mask=SlidingWindow(7), softcap=4.0), {"page_size": 1}, Kind.NATIVE, ()),
        (make_spec(mask=Full(), has_sink=True), {}, Kind.NATIVE, ()),
        (make_spec(has_sink=True), {"dtype": torch.float16}, Kind.REWRITTEN, ("sink_epilogue",)),
        (make_spec(mask=Chunked(32)), {}, Kind.REWRITTEN, ("chunks_as_requests",)),
    ],
)
def test_what_it_takes(
    calls: list[Any], spec: AttentionSpec, asked: dict[str, Any], kind: Kind, rewrites: tuple[str, ...]
) -> None:
    (lowering,) = FA4Backend(settings(**asked), [spec]).lowerings
    assert (lowering.kind, lowering.rewrites) == (kind, rewrites), lowering.reasons


@pytest.mark.parametrize(
    ("mask", "causal", "window"),
    [(Causal(), True, (None, None)), (SlidingWindow(7), True, (6, 0)), (Full(), False, (None, None))],
)
def test_what_it_asks_of_the_kernels(
    calls: list[dict[str, Any]], mask: Mask, causal: bool, window: tuple[int | None, int | None]
) -> None:
    spec = make_spec((4, 2), 64, mask, softcap=4.0, has_sink=True)
    backend = FA4Backend(settings(), [spec])
    metadata = FlashAttentionMetadata.allocate(3, 32, 16, "cpu")
    q, kv, sinks = torch.zeros(3, 4, 64), torch.zeros(7 * 16, 2, 64), torch.arange(4.0, dtype=torch.bfloat16)
    out, lse = backend.attend(AttentionCall(q, kv, kv, metadata, spec, sinks))
    assert lse is None and torch.equal(out, torch.ones_like(q))
    (told,) = calls
    assert (told["causal"], told["window_size"], told["softcap"]) == (causal, window, 4.0)
    assert told["num_splits"] == 1, (
        "the kernels' own choice of 0 may come to splits that they refuse on Hopper"
    )
    assert told["learnable_sink"].dtype is torch.bfloat16
    assert told["k"].shape == (7, 16, 2, 64) and told["k"].data_ptr() == kv.data_ptr()
    out, lse = backend.attend(AttentionCall(q, kv, kv, metadata, spec, sinks, return_lse=True))
    assert calls[1]["learnable_sink"] is None, "its LSE would have the sink in it"
    assert lse is not None and lse.shape == (3, 4)
    assert torch.equal(out, apply_sinks(torch.ones_like(q), lse, sinks))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("heads", [(8, 2), (6, 2), (4, 4)])
def test_decode_and_extend_at_every_head_dim(page_size: int, head_dim: int, heads: tuple[int, int]) -> None:
    for lens, decode in ((((0, 1), (127, 1), (3000, 1)), True), (((0, 300), (511, 1), (128, 130)), False)):
        spec = make_spec(heads, head_dim, has_sink=True)
        scene = Scene(spec, lens, page_size, torch.bfloat16, "cuda", decode=decode)
        scene.check(scene.backend("fa4"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(100)], ids=str)
def test_a_captured_step_follows_the_lengths(page_size: int, mask: Mask) -> None:
    check_replays("fa4", page_size, mask)
