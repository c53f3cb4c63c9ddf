"""`backend=jax`: the pool is read in place, programs are few, and JAX is imported when it is used. Its results are
compared with the definition in tests/semantics, as those of every backend."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

from fa_research import backends  # noqa: E402
from fa_research.backends.jax_backend import JaxBackend, bucket  # noqa: E402
from fa_research.errors import ConfigError, Unsupported  # noqa: E402
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow  # noqa: E402
from tests.helpers import DEVICES, Scene, make_spec  # noqa: E402
from tests.semantics.cases import Case  # noqa: E402
from tests.semantics.coverage import coverage, marked  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LENS = ((0, 5), (16, 1), (3, 30))


def make(scene: Scene) -> JaxBackend:
    backend = scene.backend("jax")
    assert isinstance(backend, JaxBackend)
    return backend


@pytest.mark.parametrize("inference", [False, True])
def test_the_pool_is_read_where_it_lies_and_shared_once(inference: bool) -> None:
    with torch.inference_mode(inference):
        scene = Scene(make_spec(), LENS, 16, torch.float32)
    backend = make(scene)
    with torch.inference_mode(inference):
        for _ in range(3):
            scene.run(backend)
    pool = scene.cache.kv
    handles = [handle for known in backend.handles._handles.values() for handle in known.values()]
    pointers = {handle.unsafe_buffer_pointer() for handle in handles}
    assert len(handles) == 2 and pointers == {pool.k_LNKD.data_ptr(), pool.v_LNKV.data_ptr()}


def test_handles_go_with_the_pool() -> None:
    scene = Scene(make_spec(), LENS, 16, torch.float32)
    backend = make(scene)
    scene.run(backend)
    del scene
    gc.collect()
    assert len(backend.handles) == 0


def test_what_torch_writes_after_compilation_is_read() -> None:
    """A pool that was closed over would be a constant of the program."""
    scene = Scene(make_spec(), LENS, 16, torch.float32)
    backend = make(scene)
    scene.check(backend)
    other = Scene(make_spec(), LENS, 16, torch.float32, seed=1)
    scene.q, scene.k, scene.v = other.q, other.k, other.v
    for i, (prefix, _) in enumerate(scene.lens):
        slots = scene.table[scene.requests[i].row, :prefix].long()
        scene.cache.kv.write(scene.layer_id, scene.k[i][:prefix], scene.v[i][:prefix], slots)
    scene.check(backend)


def test_the_batches_of_a_bucket_share_a_program() -> None:
    from fa_research.kernels.jax_paged import paged_attention

    lens = tuple((seq_len, 1) for seq_len in (33, 40, 47, 35, 36, 37, 38, 39))
    scene = Scene(make_spec(mask=SlidingWindow(7)), lens, 16, torch.float32, decode=True)
    backend = make(scene)
    scene.check_outputs(scene.run(backend, range(5)), range(5))
    programs = paged_attention._cache_size()
    for size in (6, 7, 8):
        scene.check_outputs(scene.run(backend, range(size)), range(size))
    assert paged_attention._cache_size() == programs
    scene.run(backend, range(4))
    assert paged_attention._cache_size() == programs + 1


def test_buckets() -> None:
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_steps_over_the_keys_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases fit one step; here keys are walked in steps of 16."""
    from fa_research.kernels import jax_paged

    monkeypatch.setattr(jax_paged, "STEP_BYTES", 1)
    for mask in (SlidingWindow(21), Chunked(40)):
        scene = Scene(
            make_spec((6, 2), mask=mask, has_sink=True), ((0, 70), (100, 45), (90, 1)), 8, torch.float32
        )
        scene.check(make(scene))


def test_calls_leave_nothing_behind() -> None:
    scene = Scene(make_spec(), LENS, 16, torch.float32)
    backend = make(scene)
    scene.run(backend)
    before = len(jax.live_arrays())
    for _ in range(50):
        scene.run(backend)
    assert len(jax.live_arrays()) <= before


PALLAS = {"options": {"kernel": "pallas"}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mask", [Causal(), SlidingWindow(7), Chunked(12), Full()], ids=lambda mask: mask.name
)
def test_decode_through_pallas(device: str, mask: Mask) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lens = ((0, 1), (15, 1), (16, 1), (32, 1), (49, 1))
    scene = Scene(make_spec((6, 2), mask=mask, has_sink=True), lens, 16, dtype, device, decode=True)
    scene.check(scene.backend("jax", **PALLAS))
    scene = Scene(make_spec((6, 2), mask=mask), ((0, 6), (20, 1), (15, 18)), 16, dtype, device)
    scene.check(scene.backend("jax", **PALLAS))  # many tokens a request: XLA


def every_decode_case() -> list[Any]:
    found = coverage("jax", "cuda", (("kernel", "pallas"),))
    return marked({"cuda": [("jax", case) for case in found.cases if case.batch == "decode"]})


@pytest.mark.parametrize(("name", "device", "case"), every_decode_case())
def test_every_decode_case_through_pallas(name: str, device: str, case: Case) -> None:
    """Masks, page sizes, softcap, sinks, head dims, NaN around the requests' own slots."""
    scene = case.scene(device)
    scene.check(scene.backend(name, **PALLAS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_pallas_in_a_padded_batch(device: str, head_dim: int) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = make_spec((4, 2), head_dim=head_dim, has_sink=True)
    scene = Scene(spec, ((0, 1), (2, 1), (33, 1)), 16, dtype, device, decode=True)
    scene.check_outputs(scene.run(scene.backend("jax", **PALLAS), padding=3), range(3))


@pytest.mark.gpu
def test_pallas_beyond_int32() -> None:
    lowest = (2**31 // (8 * 128)) // 16 + 1
    lens = ((300, 1), (0, 1), (1000, 1))
    spec = make_spec((16, 8), head_dim=128)
    scene = Scene(spec, lens, 16, torch.bfloat16, "cuda", decode=True, lowest_page=lowest)
    scene.check(scene.backend("jax", **PALLAS))


@pytest.mark.parametrize(
    ("device", "options", "head_dim", "decodes", "because"),
    [
        ("cpu", {}, 64, "xla", "pallas is interpreted off the GPU"),
        ("cpu", {"kernel": "pallas"}, 64, "pallas", "as asked"),
        ("cpu", {"kernel": "xla"}, 64, "xla", "as asked"),
        pytest.param("cuda", {}, 64, "pallas", "on a GPU", marks=pytest.mark.gpu),
        pytest.param("cuda", {}, 96, "xla", "not pallas: head dims 96", marks=pytest.mark.gpu),
    ],
)
def test_which_kernel_decodes(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    options: dict[str, str],
    head_dim: int,
    decodes: str,
    because: str,
) -> None:
    """The note names the kernel that runs."""
    from fa_research.kernels import jax_paged, pallas_decode

    ran = []
    for name, module, function in (
        ("xla", jax_paged, "paged_attention"),
        ("pallas", pallas_decode, "paged_decode"),
    ):
        real = getattr(module, function)
        spy = lambda *args, name=name, real=real, **more: (ran.append(name), real(*args, **more))[1]  # noqa: E731
        monkeypatch.setattr(module, function, spy)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    scene = Scene(make_spec(head_dim=head_dim), ((9, 1), (20, 1)), 16, dtype, device, decode=True)
    backend = scene.backend("jax", options=options)
    scene.check(backend, lse=False)
    assert ran == [decodes]
    (note,) = backend.notes
    assert note.startswith(f"backend=jax: one token a request by {decodes}, other passes by xla (")
    assert because in note


def test_what_pallas_refuses() -> None:
    scene = Scene(make_spec(head_dim=40), LENS, 16, torch.float32)
    with pytest.raises(
        Unsupported, match=r"kernel=pallas: head dims 40, 40: takes one of 16, .*256; use auto or xla"
    ):
        backends.create("jax", scene.settings(**PALLAS), scene.specs)
    with pytest.raises(
        ConfigError, match=r"backend\.options\.kernel=cuda is unknown; choose one of auto, xla, pallas"
    ):
        backends.create("jax", scene.settings(options={"kernel": "cuda"}), scene.specs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"deterministic": True}, r"backend\.deterministic=true: XLA's order of summation"),
        ({"num_splits": 4}, r"backend\.num_splits=4: .*use 0"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], says: str) -> None:
    scene = Scene(make_spec(), LENS, 16, torch.float32)
    with pytest.raises(Unsupported, match=says):
        backends.create("jax", scene.settings(**changes), scene.specs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(7), Chunked(16)], ids=str)
def test_pallas_with_64_bit_types(mask: Mask, device: str, x64: None) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    scene = Scene(make_spec((4, 2), 64, mask), ((0, 1), (15, 1), (149, 1)), 16, dtype, device, decode=True)
    scene.check(scene.backend("jax", options={"kernel": "pallas"}))


def test_queries_and_sinks_anywhere_in_memory() -> None:
    """A view of a size that needs no padding, at an address that JAX does not take."""
    scene = Scene(make_spec((3, 1), 20, has_sink=True), ((3, 2), (5, 2)), 16, torch.float32)
    q, v = (
        torch.cat([torch.zeros_like(scene.q[0][:1]), *scene.q])[1:],
        torch.cat([torch.zeros(1), scene.sinks])[1:],
    )
    assert q.data_ptr() % 64 and v.data_ptr() % 64
    scene.q, scene.sinks = list(q.split([2, 2])), v
    qkv = scene.qkv
    scene.qkv = lambda *args: (q, *qkv(*args)[1:])  # type: ignore[method-assign]
    scene.check_outputs(scene.run(make(scene)), range(2))


def test_float64_needs_x64() -> None:
    scene = Scene(make_spec(), LENS, 16, torch.float64)
    with pytest.raises(Unsupported, match="JAX_ENABLE_X64=1"):
        backends.create("jax", scene.settings(), scene.specs)


def test_float64_with_x64(x64: None) -> None:
    scene = Scene(make_spec(), LENS, 16, torch.float64)
    outs = scene.run(make(scene))
    for i, out in enumerate(outs):
        torch.testing.assert_close(out, scene.reference(i, torch.float64)[0], rtol=1e-12, atol=1e-12)


WITHOUT_JAX = """
import sys
import torch
import fa_research, fa_research.interop, fa_research.interop.dlpack, fa_research.interop.share, fa_research.runner
from fa_research import backends
from fa_research.spec import AttentionSpec
settings = backends.BackendSettings(torch.device("cpu"), torch.float32, 16, 128)
spec = AttentionSpec(4, 2, 64, 64, 0.1)
assert backends.choose(settings, [spec])[0].name == "torch"
assert "jax" in backends.names() and backends.reasons_against("jax", settings, [spec]) == ()
try:
    backends.create("fa3", backends.BackendSettings(torch.device("cpu"), torch.float32, 16, 128), [spec])
except ValueError as error:
    assert "jax" in str(error)
print(sorted({"jax", "jaxlib"} & set(sys.modules)))
"""


def test_jax_is_imported_when_attention_is_computed_and_no_earlier() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
def test_ranks_may_be_promoted_whatever_the_environment_says(kernel: str) -> None:
    """A user of JAX may have set `jax_numpy_rank_promotion=raise` for code of their own."""
    jax = pytest.importorskip("jax")
    with jax.numpy_rank_promotion("raise"):
        for decode in (True, False):
            scene = Scene(make_spec(), ((5, 1), (3, 1)), 4, torch.float32, decode=decode)
            scene.check(scene.backend("jax", options={"kernel": kernel}))
