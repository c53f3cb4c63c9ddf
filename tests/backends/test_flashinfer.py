"""`flashinfer`: what it refuses and why; its plans and page lists with a stand-in for the kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.backends import BackendSettings
from fa_research.backends.flashinfer import FlashInferBackend, natural
from fa_research.backends.flashinfer_plans import partial_bytes
from fa_research.errors import ConfigError
from fa_research.interop.served import shared_backend as interop_backend
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec
from tests.backends.flashinfer_stand_in import FlashInferOnCPU, _Wrapper, install
from tests.engine.lab import EAGER, PADDED, Lab, Place, Session, places, prompts_of
from tests.helpers import Scene, make_spec

MIXED = ((0, 6), (20, 1), (15, 18))
DECODE = ((14, 1), (15, 1), (40, 1), (3, 1))
WINDOW, CHUNK = SlidingWindow(9), Chunked(16)


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> list[_Wrapper]:
    return install(monkeypatch)


def asked(**more: Any) -> BackendSettings:
    base = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "page_size": 16, "max_context_len": 128}
    return BackendSettings(**base | more)  # type: ignore[arg-type]


def reasons(spec: AttentionSpec, **more: Any) -> tuple[str, ...]:
    (lowering,) = FlashInferBackend(asked(**more), [spec]).lowerings
    return lowering.reasons


# What it refuses


def test_everything_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    said = FlashInferBackend.unavailable(asked())
    wanted = ("there is no CUDA device here", 'pip install -e ".[flashinfer]"', "no nvcc", "ninja")
    assert len(said) == len(wanted)
    assert all(word in reason for word, reason in zip(wanted, said, strict=True))


def test_compiled_kernels_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (said,) = FlashInferBackend.unavailable(asked())
    assert "no CUDA device" in said


def test_fa3_kernels_need_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    said = FlashInferBackend.unavailable(asked(options={"implementation": "fa3"}))
    assert said[0].startswith("backend.options.implementation=fa3: needs compute capability 9.x")
    assert not any("compute capability" in reason for reason in FlashInferBackend.unavailable(asked()))


def test_what_the_kernels_lack_is_refused_with_reasons() -> None:
    assert reasons(make_spec()) == ()
    assert any("head dim 96: takes 64, 128, 256" in r for r in reasons(make_spec(head_dim=96)))
    assert any("dtype float32" in r for r in reasons(make_spec(), dtype=torch.float32))
    assert any("num_splits=4" in r for r in reasons(make_spec(), num_splits=4))
    assert reasons(make_spec(), num_splits=1) == ()


def test_deterministic_needs_the_kernels_with_fixed_tiles() -> None:
    fa2, fa3 = {"implementation": "fa2"}, {"implementation": "fa3"}
    assert any("deterministic=true" in r for r in reasons(make_spec(), deterministic=True, options=fa2))
    assert reasons(make_spec(), deterministic=True, options=fa3) == ()
    cuda_cores = {"tensor_cores": False, **fa3}
    assert any("always split" in r for r in reasons(make_spec(), deterministic=True, options=cuda_cores))


def test_cuda_cores_serve_some_group_sizes() -> None:
    off = {"tensor_cores": False}
    assert reasons(make_spec((8, 1)), options=off) == ()
    assert any("6 query heads a KV head" in r for r in reasons(make_spec((12, 2)), options=off))


@pytest.mark.parametrize("option", [{"implementation": "fa4"}, {"tensor_cores": "yes"}, {"speed": 11}])
def test_unknown_options(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"backend\.options\.{min(option)}"):
        FlashInferBackend(asked(options=option), [])


@pytest.mark.parametrize(
    ("heads", "more", "cores"),
    [
        ((4, 4), {}, "CUDA"),
        ((4, 2), {}, "CUDA"),
        ((8, 2), {}, "tensor"),
        ((10, 2), {}, "tensor"),
        ((4, 4), {"num_splits": 1}, "tensor"),
        ((4, 4), {"options": {"tensor_cores": True}}, "tensor"),
        ((8, 2), {"options": {"tensor_cores": False}}, "CUDA"),
    ],
)
def test_notes_say_which_cores_decode(heads: tuple[int, int], more: dict[str, Any], cores: str) -> None:
    more["options"] = {"implementation": "fa2", **more.get("options", {})}
    (note,) = FlashInferBackend(asked(**more), [make_spec(heads)]).notes
    assert note.startswith("flashinfer ") and note.endswith(f"extends by fa2, decode on {cores} cores")


def test_sinks_and_chunks_are_rewritten() -> None:
    backend = FlashInferBackend(asked(), [make_spec(mask=Chunked(32), has_sink=True)])
    (lowering,) = backend.lowerings
    assert lowering.rewrites == ("chunks_as_requests", "sink_epilogue") and not lowering.reasons


def test_jax_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths are on the device alone."""
    made = FlashInferBackend(asked(), [make_spec()])
    monkeypatch.setattr(backends, "create", lambda *args: made)
    with pytest.raises(ValueError, match="backend=flashinfer plans on the host"):
        interop_backend("flashinfer", torch.device("cuda"), torch.bfloat16, 16, 128, make_spec())


def test_the_logarithm_is_natural() -> None:
    lse = torch.tensor([[0.0, 10.0, -float("inf")]])
    torch.testing.assert_close(torch.exp2(lse), torch.exp(natural(lse.clone())))


@pytest.mark.parametrize(("batch_size", "heads"), [(1, (32, 8)), (512, (32, 8)), (64, (16, 1)), (7, (4, 4))])
def test_partial_results_of_the_largest_plan_fit(batch_size: int, heads: tuple[int, int]) -> None:
    """As FlashInfer's planner asks for a captured step on tensor cores: PrefillPlan in attention/scheduler.cuh."""
    num_heads, kv_heads = heads
    tiles = -(-batch_size * (num_heads // kv_heads) // 16) + batch_size - 1
    pieces = max(2 * 132 // kv_heads, tiles)
    needed = num_heads * pieces * 16 * (128 + 1) * 4
    spec = make_spec(heads, head_dim=128)
    assert needed <= partial_bytes(spec, 132, 16, batch_size) <= 3 * needed + 2**20


# All but the kernels


@pytest.mark.parametrize("mask", [Causal(), WINDOW, CHUNK, Full()], ids=lambda mask: mask.name)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("lens", [MIXED, DECODE], ids=["mixed", "decode"])
def test_what_the_wrappers_are_told_is_the_batch(
    wrappers: list[_Wrapper], lens: tuple[tuple[int, int], ...], page_size: int, mask: Mask
) -> None:
    """Over shuffled pages, with NaN in every slot that nothing wrote; sinks take the LSE."""
    spec = make_spec((4, 2), mask=mask, softcap=4.0, has_sink=True)
    scene = Scene(spec, lens, page_size, torch.float32, decode=lens is DECODE)
    scene.check(FlashInferOnCPU(scene.settings(), scene.specs))
    assert {type(w).__name__[:11] for w in wrappers} == {
        "BatchDecode" if lens is DECODE else "BatchPrefill"[:11]
    }


CAUSAL = AttentionSpec(4, 2, 64, 64, 0.125)
KINDS = {
    "window": (CAUSAL, dataclasses.replace(CAUSAL, mask=WINDOW), CAUSAL),
    "chunk": (CAUSAL, dataclasses.replace(CAUSAL, mask=CHUNK)),
}


def lab_of(place: Place, specs: tuple[AttentionSpec, ...]) -> Lab:
    return Lab(place, num_layers=len(specs), specs=specs, make_backend=FlashInferOnCPU)


@pytest.mark.parametrize("specs", KINDS.values(), ids=KINDS)
@pytest.mark.usefixtures("wrappers")
@pytest.mark.parametrize("place", places(EAGER, PADDED))
def test_decode_is_right_across_batches(place: Place, specs: tuple[AttentionSpec, ...]) -> None:
    """Long before short and short before long, of several sizes; chunks are virtual requests that are planned, too."""
    lab = lab_of(place, specs)
    decoder = lab.decoder(1, 2, 4)
    session = Session(lab, (21, 4, 33))
    for which in ((0, 1, 2), (2,), (1, 0)):
        session.run(decoder, which, 8)
    session.check()


def test_each_kind_of_layer_is_planned_once_a_step(wrappers: list[_Wrapper]) -> None:
    lab = lab_of(PADDED, KINDS["window"])
    requests, first = lab.prefill(prompts_of(21, 4, 33))
    assert [w.calls for w in wrappers] == [["plan"]] * 2
    assert wrappers[0].indices is wrappers[1].indices, "one list of pages for all layers"
    wrappers.clear()
    decoder = lab.decoder(2, 4)
    decoder.start(requests, first.argmax(-1))
    for step in range(1, 8):
        decoder.step()
        assert [w.calls for w in wrappers] == [["plan", *["fast_decode_plan"] * (step - 1)]] * 2
    assert wrappers[0].indices is wrappers[1].indices


def test_two_runners_of_one_backend_plan_apart(wrappers: list[_Wrapper]) -> None:
    lab = lab_of(PADDED, KINDS["chunk"])
    session = Session(lab, (21, 4, 33))
    wide, narrow = lab.decoder(4), lab.decoder(1, bound=96)
    for _ in range(3):
        session.run(wide, (0, 1, 2), 2)
        session.run(narrow, (2,), 3)
    session.check()
