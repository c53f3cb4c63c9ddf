"""A decode call from jitted JAX becomes the replay of a CUDA graph; what it reads may change, where it reads may not.

Legend: B requests.
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
from tests.interop.test_jax_calls import arguments, make_scene  # noqa: E402

pytestmark = pytest.mark.gpu
NAMES = [name for name in ("triton", "fa3", "fa2") if name in backends.names()]


def jitted(static: dict[str, Any], name: str) -> Any:
    return jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name))


@pytest.mark.parametrize("name", NAMES)
def test_replays_read_what_the_buffers_hold_now(name: str) -> None:
    scene = make_scene(device="cuda")
    scene.backend(name)
    arrays, static = arguments(scene)
    run, lens_B = jitted(static, name), torch.tensor([1, 16, 17, 50], dtype=torch.int32, device="cuda")
    graphs: set[int] = set()
    for i in range(60):
        lens = (lens_B - i % 12).clamp_min(1)
        arrays["cache_seqlens_B"] = to_jax(lens)
        out = to_torch(run(arrays)).clone()
        expected = to_torch(paged_attention(**arrays, **static, backend="torch"))
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
        captured = [call.replays for call in ffi._calls if call.replays is not None]  # not the definition's
        graphs.add(len(captured[-1]._graphs))
    assert max(graphs) > 0, "no call was captured: XLA never passed the same addresses twice"


@pytest.mark.quiet  # the memory is that of the whole GPU
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_calls_leave_memory_as_it_was(name: str) -> None:
    scene = make_scene(device="cuda")
    scene.backend(name)
    arrays, static = arguments(scene)
    run = jitted(static, name)

    def calls(count: int) -> int:
        for _ in range(count):
            arrays["q_THD"] = run(arrays)
        jax.block_until_ready(arrays["q_THD"])
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    before = calls(100)
    assert before - calls(1000) < 32 << 20


def test_graphs_of_a_call_are_bounded() -> None:
    from fa_research.interop import replay

    replays, done, stream = replay.Replays(), torch.zeros(1, device="cuda"), torch.cuda.current_stream()
    for address in range(2 * replay._MOST):
        for _ in range(3):
            if not replays.launch(stream.cuda_stream, (address,)):
                replays.run(lambda: done.add_(1), stream.cuda_stream, (address,))
    assert len(replays._graphs) <= replay._MOST
    assert done.item() == 3 * 2 * replay._MOST


def test_a_spoilt_capture_costs_itself_alone() -> None:
    from fa_research.interop import replay

    replays, done, stream = replay.Replays(), torch.zeros(1, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def waits() -> None:
        done.add_(1).item()

    with torch.cuda.stream(stream):
        replays.run(waits, stream.cuda_stream, (1,))
        with pytest.raises(RuntimeError, match="capturing"):
            replays.run(waits, stream.cuda_stream, (1,))
        before = done.item()
        for _ in range(3):
            if not replays.launch(stream.cuda_stream, (2,)):
                replays.run(lambda: done.add_(1), stream.cuda_stream, (2,))
    torch.cuda.synchronize()
    assert done.item() == before + 3 and len(replays._graphs) == 1
