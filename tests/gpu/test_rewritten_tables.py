"""What went wrong in other engines between the host that rewrites the page table and kernels that still read it."""

from __future__ import annotations

import random

import pytest
import torch

from fa_research import backends
from fa_research.kv_cache import ReqToTokenPool
from tests.helpers import Scene, make_spec, slots_of, table_row

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("page_size", [16, 256])
def test_the_table_may_be_rewritten_while_a_kernel_is_under_way(name: str, page_size: int) -> None:
    """known failure: page table rewritten while a kernel still reads it (SGLang #36335). A delayed stream; the
    host goes on at once, closes the requests, gives their rows and pages to others and overwrites the
    pages."""
    if name == "torch":
        pytest.skip("torch reads lengths on the host, so it is never ahead of the device")
    scene = Scene(make_spec(), ((300, 1), (0, 1), (1000, 1)), page_size, torch.bfloat16, "cuda", decode=True)
    backend = scene.backend(name)
    expected = scene.run(backend)
    batch, (q_THD, _, _) = scene.batch(), scene.qkv()
    pools = (scene.cache.kv.k(1), scene.cache.kv.v(1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)  # about half a second
        backend.init_forward_metadata(batch, scene.table)
        out, _ = backend.forward(q_THD, *pools, backend.lowerings[1])
        rows = {request.row for request in scene.requests}
        for request in scene.requests:
            scene.cache.close(request)
        tenants = [scene.cache.open() for _ in scene.requests]
        scene.cache.extend(tenants, [1000, 300, 1])
        scene.cache.kv.poison()
        assert {tenant.row for tenant in tenants} == rows
        assert not side.query(), "something waited for the device, so nothing was rewritten early"
    side.synchronize()
    assert torch.equal(out, torch.cat(expected))
    assert all(table_row(scene.cache, tenant) == slots_of(scene.cache, tenant) for tenant in tenants)


def test_updates_of_the_table_queue_up_behind_a_busy_stream() -> None:
    """known failure: page table rewritten while a kernel still reads it (SGLang #36335), the other way round:
    the host's staging memory must not be reused while copies from it are still under way."""
    rng = random.Random(0)
    pool = ReqToTokenPool(8, 64, page_size=4, device="cuda")
    expected = pool.req_to_token.cpu().view(9, 16, 4)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        pool.write_pages([1], [0], [1], [0])  # warm: the first pinned memory is allocated with a wait
        torch.cuda._sleep(1_000_000_000)
        for _ in range(200):
            rows, indices = [rng.randrange(1, 9) for _ in range(5)], rng.sample(range(16), 5)
            pages = [rng.randrange(1, 1000) for _ in range(5)]
            pool.write_pages(rows, indices, [1] * 5, pages)
            for row, index, page in zip(rows, indices, pages, strict=True):
                expected[row, index] = page * 4 + torch.arange(4)
    side.synchronize()
    assert torch.equal(pool.req_to_token.cpu(), expected.view(9, 64))
