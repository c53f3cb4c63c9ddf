"""Torch writes the cache, JAX reads it: in that order on the GPU too, without the host waiting."""

from __future__ import annotations

import pytest
import torch

jax = pytest.importorskip("jax")

from fa_research.interop import deferred_release  # noqa: E402
from fa_research.interop.dlpack import jax_device, to_jax, to_torch  # noqa: E402
from tests.helpers import Scene, make_spec  # noqa: E402

pytestmark = pytest.mark.gpu
LENS = tuple((500 + i, 1) for i in range(8))
SLEEP_CYCLES = 200_000_000  # about 0.1 s
SIZE = 1 << 20


def make_scene() -> Scene:
    return Scene(make_spec((8, 2), 128), LENS, 16, torch.bfloat16, "cuda", decode=True)


def test_jax_waits_for_a_delayed_writer() -> None:
    scene = make_scene()
    backend = scene.backend("jax")
    scene.check_outputs(scene.run(backend), range(len(LENS)))  # compiles
    kv, layer = scene.cache.kv, scene.layer_id
    k, v = kv.k(layer).clone(), kv.v(layer).clone()
    kv.poison()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    kv.k(layer).copy_(k)
    kv.v(layer).copy_(v)
    outs = scene.run(backend)
    scene.check_outputs(outs, range(len(LENS)))


def test_torch_waits_for_a_delayed_reader() -> None:
    scene = make_scene()
    backend = scene.backend("jax")
    scene.run(backend)
    device = jax_device(torch.device("cuda", 0))
    x = jax.device_put(jax.numpy.eye(4096, dtype=jax.numpy.float32), device)
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, y: y @ x, x))
    busy(x).block_until_ready()
    torch.cuda.synchronize()
    pending = busy(x)
    outs = scene.run(backend)  # behind `pending`: JAX has one stream for computations
    scene.cache.kv.poison()
    torch.cuda.synchronize()
    pending.block_until_ready()
    scene.check_outputs(outs, range(len(LENS)))


def test_memory_of_the_device_does_not_grow() -> None:
    scene = make_scene()
    backend = scene.backend("jax")
    device = jax_device(torch.device("cuda", 0))

    def in_use() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), device.memory_stats()["bytes_in_use"]

    for _ in range(20):
        scene.run(backend)
    before = in_use()
    for _ in range(1000):
        scene.run(backend)
    after = in_use()
    assert after[0] <= before[0] and after[1] <= before[1] + (1 << 20)


def test_jax_has_its_memory_back_when_torch_has_read_it() -> None:
    x = jax.numpy.full(SIZE, 1.0).block_until_ready()
    tensor = to_torch(x)
    del x
    torch.cuda._sleep(SLEEP_CYCLES)
    copy = tensor.clone()
    del tensor
    jax.block_until_ready([jax.numpy.full(SIZE, float(2 + i)) for i in range(4)])
    assert copy.eq(1.0).all()


def test_torch_has_its_memory_back_when_jax_has_read_it() -> None:
    late = jax.jit(lambda x, y: jax.lax.fori_loop(0, 50, lambda _, z: z @ x, x)[0, 0] * 0 + y)
    eye, ones = jax.numpy.eye(4096, dtype=jax.numpy.float32), torch.ones(SIZE, device="cuda")
    late(eye, to_jax(ones)).block_until_ready()
    out = late(eye, to_jax(ones))
    del ones
    others = [torch.full((SIZE,), float(2 + i), device="cuda") for i in range(4)]
    assert to_torch(out).eq(1.0).all(), others[0][0]


def test_a_tensor_may_die_while_a_graph_is_captured() -> None:
    tensors = [to_torch(jax.numpy.full(SIZE, float(i))) for i in range(3)]
    ones, graph = torch.ones(SIZE, device="cuda"), torch.cuda.CUDAGraph()
    torch.cuda._sleep(SLEEP_CYCLES)
    sums = [tensor + ones for tensor in tensors]
    del tensors[0]  # its event is asked for later on
    with torch.cuda.graph(graph):
        ones.add_(1)
        tensors.clear()
    again = jax.block_until_ready([jax.numpy.full(SIZE, 7.0) for _ in range(4)])
    assert [x[0].item() for x in sums] == [1.0, 2.0, 3.0]
    for _ in range(5):  # those that died in the capture are marked after it
        to_jax(ones)
        torch.cuda.synchronize()
    assert not deferred_release._pending, again


def test_nothing_is_kept_once_it_was_read() -> None:
    for _ in range(20):
        to_torch(jax.numpy.full(SIZE, 1.0)).add(1)
    torch.cuda.synchronize()
    deferred_release.release_ready()
    assert not deferred_release._pending
