"""The Pallas decode kernel against the definition in float64: interpreted on the CPU, compiled on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

from fa_research.interop.dlpack import to_jax, to_torch  # noqa: E402
from fa_research.kernels.pallas_decode import Config, paged_decode  # noqa: E402
from fa_research.masks import Causal, Chunked, Mask, SlidingWindow  # noqa: E402
from tests.helpers import DEVICES, Scene, assert_accurate, make_spec  # noqa: E402

LENS = {
    "cpu": ((0, 1), (15, 1), (31, 1), (32, 1), (99, 1)),
    "cuda": ((0, 1), (127, 1), (1000, 1), (4095, 1), (2049, 1)),
}


def run(scene: Scene, config: Config, which: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel over what the scene's cache holds, the new tokens included."""
    backend = scene.backend("torch")
    scene.run(backend)
    metadata, spec, kv = backend.forward_metadata, scene.spec, scene.cache.kv
    band = spec.mask.band()
    assert metadata is not None and band is not None
    pools = [to_jax(x.flatten(0, 1)) for x in (kv.k_LNKD, kv.v_LNKV)]
    out, lse = paged_decode(
        to_jax(torch.cat(scene.q)), *pools, scene.layer_id * kv.num_slots, to_jax(metadata.page_table_BP),
        to_jax(metadata.cache_seqlens_int32_B), None if scene.sinks is None else to_jax(scene.sinks),
        page_size=scene.page_size, scale=spec.scale, softcap=spec.softcap, window=band.window, chunk=band.chunk,
        config=config, interpret=scene.device == "cpu",
    )  # fmt: skip
    return to_torch(out), to_torch(lse)


def make_scene(device: str, mask: Mask, page_size: int = 16, **more: Any) -> Scene:
    heads = more.pop("heads", (4, 2))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Scene(make_spec(heads, 64, mask, **more), LENS[device], page_size, dtype, device, decode=True)


def check(scene: Scene, config: Config) -> None:
    out, lse = run(scene, config)
    scene.check_outputs(out.split(1), range(len(scene.lens)))
    for i, lse_QH in enumerate(lse.split(1)):
        exact, low = (scene.reference(i, dtype)[1] for dtype in (torch.float64, scene.dtype))
        assert_accurate(lse_QH, exact, low, softcap=scene.spec.softcap, what=f"lse of request {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
@pytest.mark.parametrize(
    ("mask", "more"),
    [
        (Causal(), {}),
        (Causal(), {"softcap": 4.0, "heads": (6, 2)}),
        (SlidingWindow(21), {"has_sink": True}),
        (Chunked(40), {"heads": (16, 1), "has_sink": True, "softcap": 4.0}),
    ],
    ids=["causal", "softcap", "window-sink", "chunked-sink-softcap"],
)
@pytest.mark.parametrize("cuts", [1, 3], ids=lambda cuts: f"cuts{cuts}")
def test_matches_the_definition(
    device: str, page_size: int, mask: Mask, more: dict[str, Any], cuts: int
) -> None:
    check(make_scene(device, mask, page_size, **more), Config(block_n=32, cuts=cuts))


@pytest.mark.parametrize("device", DEVICES)
def test_with_its_own_choice_of_cuts(device: str) -> None:
    check(make_scene(device, Causal()), Config(block_n=16))


@pytest.mark.parametrize("cuts", [1, 2])
def test_an_empty_request(cuts: int) -> None:
    scene = make_scene("cpu", Causal())
    pool = to_jax(torch.full((64, 2, 64), torch.nan))
    table, lens = to_jax(torch.zeros(5, 4, dtype=torch.int32)), to_jax(torch.zeros(5, dtype=torch.int32))
    config = Config(block_n=16, cuts=cuts)
    out, lse = paged_decode(
        to_jax(torch.cat(scene.q)), pool, pool, 0, table, lens,
        page_size=16, scale=1.0, config=config, interpret=True,
    )  # fmt: skip
    assert (to_torch(out) == 0).all() and (to_torch(lse) == -torch.inf).all()
