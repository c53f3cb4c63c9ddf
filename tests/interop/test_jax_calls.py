"""`paged_attention` from JAX: served by our backends, under jit, without copies of the pool, with their errors.

Legend: T query tokens, B requests, P pages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

from fa_research import backends  # noqa: E402
from fa_research.interop import ffi  # noqa: E402
from fa_research.interop.dlpack import to_jax, to_torch  # noqa: E402
from fa_research.interop.jax import paged_attention  # noqa: E402
from fa_research.interop.share import share_metadata, share_pool  # noqa: E402
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow  # noqa: E402
from tests.helpers import DEVICES, Scene, make_spec  # noqa: E402

LENS = {"decode": ((0, 1), (15, 1), (16, 1), (49, 1)), "mixed": ((0, 6), (20, 1), (15, 18), (0, 1))}
CALLABLE = [name for name in backends.names() if name not in ("jax", "flashinfer")]  # which refuse
NAMES = pytest.mark.parametrize("name", CALLABLE)


def arguments(scene: Scene) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, static arguments) of a call over what the scene's cache holds, new tokens included."""
    backend = backends.create("torch", scene.settings(), scene.specs)
    scene.run(backend)  # writes the new tokens
    metadata, pool, spec = backend.forward_metadata, share_pool(scene.cache.kv), scene.spec
    assert metadata is not None
    shared = share_metadata(metadata)
    arrays = {
        "q_THD": to_jax(torch.cat(scene.q)),
        "k_PSKD": pool.k_LPSKD,
        "v_PSKV": pool.v_LPSKV,
        "page_table_BP": shared.page_table_BP,
        "cache_seqlens_B": shared.cache_seqlens_int32_B,
        "cu_seqlens_q_B1": None if scene.decode else shared.cu_seqlens_q_B1,
        "sinks_H": None if scene.sinks is None else to_jax(scene.sinks),
    }
    static = {"mask": spec.mask, "scale": spec.scale, "softcap": spec.softcap, "layer": scene.layer_id}
    static["device"] = scene.device  # JAX's default may be another
    return arrays, static


def make_scene(mask: Mask | None = None, lens: str = "decode", device: str = "cpu", **more: Any) -> Scene:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = make_spec((4, 2), 64, mask, **more)
    return Scene(spec, LENS[lens], 16, dtype, device, decode=lens == "decode")


@NAMES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", list(LENS))
@pytest.mark.parametrize(
    ("mask", "sink"),
    [(Causal(), False), (SlidingWindow(7), True), (Full(), False)],
    ids=["causal", "window", "full"],
)
def test_under_jit_it_is_the_definition(name: str, device: str, lens: str, mask: Mask, sink: bool) -> None:
    scene = make_scene(mask, lens, device, has_sink=sink)
    scene.backend(name)  # skips where it cannot
    arrays, static = arguments(scene)
    run = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name, return_lse=True))
    for _ in range(2):
        out, lse = run(arrays)
        counts = [new for _, new in scene.lens]
        scene.check_outputs(to_torch(out).split(counts), range(len(counts)))
        for i, lse_QH in enumerate(to_torch(lse).split(counts)):
            torch.testing.assert_close(
                lse_QH.double(), scene.reference(i, torch.float64)[1], rtol=1e-2, atol=1e-2
            )


def test_outside_jit_too() -> None:
    scene = make_scene()
    arrays, static = arguments(scene)
    out = paged_attention(**arrays, **static)
    scene.check_outputs(to_torch(out).split(1), range(len(scene.lens)))


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_under_jit_without_a_device_it_is_jaxs_default(name: str) -> None:
    device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    scene = make_scene(device=device)
    arrays, static = arguments(scene)
    del static["device"]
    out = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name))(arrays)
    scene.check_outputs(to_torch(out).split(1), range(len(scene.lens)))


@pytest.mark.parametrize("device", DEVICES)
def test_auto_is_a_backend_that_a_jax_program_can_call(device: str) -> None:
    """On a GPU FA3 comes first, and has chunks as virtual requests only, made of lengths that the host knows."""
    scene = make_scene(Chunked(16), device=device)
    arrays, static = arguments(scene)
    run = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend="auto"))
    scene.check_outputs(to_torch(run(arrays)).split(1), range(len(scene.lens)))


def test_the_pool_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene()
    arrays, static = arguments(scene)
    seen: list[int] = []
    call = ffi.Call.tensors

    def tensors(self: ffi.Call, addresses: tuple[int, ...]) -> Any:
        seen.extend(addresses)
        return call(self, addresses)

    monkeypatch.setattr(ffi.Call, "tensors", tensors)
    jax.jit(lambda arrays: paged_attention(**arrays, **static))(arrays).block_until_ready()
    pool = scene.cache.kv
    assert {pool.k_LNKD.data_ptr(), pool.v_LNKV.data_ptr()} <= set(seen)


def test_in_a_scan_over_layers() -> None:
    """The layer may be traced: one program for all layers, over the pool of all layers."""
    scene = make_scene()
    arrays, static = arguments(scene)
    static.pop("layer")

    def over_layers(arrays: dict[str, Any]) -> Any:
        step = lambda _, layer: (None, paged_attention(**arrays, **static, layer=layer))  # noqa: E731
        return jax.lax.scan(step, None, jax.numpy.arange(2))[1]

    scene.cache.kv.k(0).zero_()
    scene.cache.kv.v(0).fill_(2.0)
    outs = to_torch(jax.jit(over_layers)(arrays))
    scene.check_outputs(outs[1].split(1), range(len(scene.lens)))
    torch.testing.assert_close(outs[0], torch.full_like(outs[0], 2.0))


@pytest.mark.parametrize("name", ["torch", "triton", "flex"])
def test_a_padded_batch(name: str) -> None:
    """Two requests without tokens, and tokens of nobody: what batches of a bucket look like."""
    scene = make_scene(lens="mixed")
    arrays, static = arguments(scene)
    pad, total = jax.numpy.pad, sum(new for _, new in scene.lens)
    arrays["q_THD"] = pad(arrays["q_THD"], ((0, 6), (0, 0), (0, 0)), constant_values=jax.numpy.nan)
    arrays["page_table_BP"] = pad(arrays["page_table_BP"], ((0, 2), (0, 3)))
    arrays["cache_seqlens_B"] = pad(arrays["cache_seqlens_B"], (0, 2))
    arrays["cu_seqlens_q_B1"] = pad(arrays["cu_seqlens_q_B1"], (0, 2), mode="edge")
    run = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name, return_lse=True))
    outs = to_torch(run(arrays)[0])
    scene.check_outputs(outs[:total].split([new for _, new in scene.lens]), range(len(scene.lens)))


@NAMES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stated", [1, None])
@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_are_those_of_the_requests_that_have_them(
    name: str, device: str, stated: int | None, tokens: int
) -> None:
    """One query at most, which not every request has: cumulative lengths say whose they are, and not their number."""
    scene = make_scene(lens="decode", device=device)
    scene.backend(name)  # skips where it cannot
    arrays, static = arguments(scene)
    cumulative = jax.numpy.asarray([0, 0, 0, 1, 1], dtype="int32")
    arrays["cu_seqlens_q_B1"] = jax.device_put(cumulative, arrays["q_THD"].device)
    arrays["q_THD"] = arrays["q_THD"][2 : 2 + tokens]
    run = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name, max_seq_len_q=stated))
    for _ in range(3):
        scene.check_outputs([to_torch(run(arrays))[:1]], [2])


def test_triton_writes_the_output_where_xla_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa_research.kernels import paged_decode as kernel

    scene = make_scene()
    arrays, static = arguments(scene)
    asked: list[Any] = []
    original = kernel.paged_decode

    def watched(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        asked.append(out)
        return original(*args, out=out, **kwargs)

    monkeypatch.setattr(kernel, "paged_decode", watched)
    out = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend="triton"))(arrays)
    scene.check_outputs(to_torch(out).split(1), range(len(scene.lens)))
    assert [tensor.data_ptr() for tensor in asked] == [out.unsafe_buffer_pointer()]


def test_equal_calls_share_a_number_and_leave_nothing_behind() -> None:
    scene = make_scene()
    arrays, static = arguments(scene)
    run = jax.jit(lambda arrays: paged_attention(**arrays, **static))
    run(arrays).block_until_ready()
    calls, live = len(ffi._calls), len(jax.live_arrays())
    jax.jit(lambda arrays: 2 * paged_attention(**arrays, **static))(arrays).block_until_ready()
    for _ in range(50):
        run(arrays).block_until_ready()
    assert len(ffi._calls) == calls and len(jax.live_arrays()) <= live


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a wrong page id is an illegal address")
def test_an_error_while_the_program_runs_is_a_python_error() -> None:
    arrays, static = arguments(make_scene())
    arrays["page_table_BP"] = arrays["page_table_BP"] + 100_000
    with pytest.raises(jax.errors.JaxRuntimeError, match="IndexError: index .* is out of bounds"):
        jax.block_until_ready(
            jax.jit(lambda arrays: paged_attention(**arrays, **static, backend="torch"))(arrays)
        )


def test_chunks_by_predicate_and_not_by_rewriting() -> None:
    scene = make_scene(Chunked(12))
    arrays, static = arguments(scene)
    out = jax.jit(lambda arrays: paged_attention(**arrays, **static, backend="torch"))(arrays)
    scene.check_outputs(to_torch(out).split(1), range(len(scene.lens)))
