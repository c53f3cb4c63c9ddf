"""What a layer does around the backend: rotate, write, read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fa_research import backends
from fa_research.attention.layer import PagedAttention
from fa_research.attention.reference import attention
from fa_research.masks import SlidingWindow
from tests.helpers import DEVICES, Scene, make_spec, slots_of

LENS = ((0, 6), (5, 1), (9, 12))
THETA = 1000.0


def rope_table(positions: int, head_dim: int, device: str) -> Tensor:
    frequencies = THETA ** -(torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device, torch.float32)


def rotated(x_THD: Tensor, first: int) -> Tensor:
    """The rotation as complex multiplication, in float64."""
    half = x_THD.shape[-1] // 2
    frequencies = THETA ** -(torch.arange(half, dtype=torch.float64, device=x_THD.device) * 2 / (2 * half))
    positions = torch.arange(first, first + x_THD.shape[0], dtype=torch.float64, device=x_THD.device)
    turn = torch.polar(
        torch.ones(1, dtype=torch.float64, device=x_THD.device), positions[:, None] * frequencies
    )
    pairs = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double()) * turn[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def start(scene: Scene) -> PagedAttention:
    backend = backends.create("torch", scene.settings(), scene.specs)
    batch = scene.batch()
    backend.init_forward_metadata(batch, scene.table)
    return PagedAttention(backend, scene.cache.kv, batch, backend.lowerings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_sink", [False, True])
def test_rope_at_the_positions_of_the_request(device: str, has_sink: bool) -> None:
    """New tokens are rotated at their place in the request, not in the batch. Cached keys are as they were written."""
    scene = Scene(make_spec(mask=SlidingWindow(8), has_sink=has_sink), LENS, 4, torch.float32, device)
    attend, (q, k, v) = start(scene), scene.qkv()
    before = k.clone()
    out = attend(1, q, k, v, rope=rope_table(32, 64, device), sinks_H=scene.sinks)
    assert torch.equal(k, before), "the keys of the projection are not the layer's to change"
    for i, (part, (prefix, new)) in enumerate(zip(out.split([n for _, n in LENS]), LENS, strict=True)):
        keys = torch.cat((scene.k[i][:prefix].double(), rotated(scene.k[i][prefix:], prefix)))
        query, q_pos = rotated(scene.q[i], prefix), torch.arange(prefix, prefix + new, device=device)
        exact, _ = attention(
            query, keys, scene.v[i], q_pos, scene.spec, sinks_H=scene.sinks, compute_dtype=torch.float64
        )
        torch.testing.assert_close(part.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_call_is_a_write_and_a_read() -> None:
    scene = Scene(make_spec(), LENS, 4, torch.float32)
    attend, (q, k, v) = start(scene), scene.qkv()
    whole = attend(1, q, k, v, rope=None)
    attend.write(1, q, k, v, None)
    assert torch.equal(attend.read(1, q), whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("decode", [False, True], ids=["extend", "decode"])
def test_the_write_touches_the_new_slots_of_one_layer(rope: bool, decode: bool, device: str) -> None:
    lens = tuple((p + n - 1, 1) for p, n in LENS) if decode else LENS
    scene = Scene(make_spec(), lens, 4, torch.float32, device, decode=decode)
    start(scene).write(1, *scene.qkv(), rope_table(32, 64, device) if rope else None)
    written = {slot for request in scene.requests for slot in slots_of(scene.cache, request)}
    for pool in (scene.cache.kv.k_LNKD, scene.cache.kv.v_LNKV):
        assert pool[0].isnan().all()
        finite = pool[1].isfinite().flatten(1)
        assert set(finite.any(1).nonzero().flatten().tolist()) == written
        assert finite[sorted(written)].all()
