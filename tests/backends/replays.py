"""One captured decode pass, replayed on other lengths and pages."""

from __future__ import annotations

import torch

from fa_research.engine.cuda_graph import GraphSet
from fa_research.masks import Mask
from tests.helpers import Scene, make_spec


def check_replays(name: str, page_size: int, mask: Mask, device: str = "cuda") -> None:
    """Metadata, plan and attention of a decode step on static buffers: after the lengths, pages and queries have
    changed, a replay (on the CPU: the step again) is right, and equals an eager pass of the same width bit by bit."""
    on_gpu = device == "cuda"
    prefixes = (0, 900, 127, 16, 4095, 300, 128, 2000) if on_gpu else (0, 90, 12, 16, 200, 30, 128, 1)
    spec = make_spec((8, 2), 128, mask) if on_gpu else make_spec((2, 1), 16, mask)
    lens = tuple((prefix, 1) for prefix in prefixes)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    scene = Scene(spec, lens, page_size, dtype, device, decode=True)
    backend = scene.backend(name)
    scene.run(backend)  # writes every request's new token
    state = backend.init_cuda_graph_state(4, scene.cache.req_to_token.max_context_len)
    static, q_THD = scene.batch([0, 1, 2, 3]), torch.cat(scene.q[:4])
    caches = (scene.cache.kv.k(scene.layer_id), scene.cache.kv.v(scene.layer_id))

    def attend() -> torch.Tensor:
        return backend.forward(q_THD, *caches, backend.lowerings[scene.layer_id])[0]

    def step(batch_size: int) -> torch.Tensor:
        backend.init_forward_metadata_capture_cuda_graph(static, scene.table, state)
        return attend()

    replay = GraphSet(step, [4]).replay if on_gpu else step
    for which in ([4, 5, 6, 7], [7, 0, 4, 2], [0, 1, 2, 3]):
        batch = scene.batch(which)
        q_THD.copy_(torch.cat([scene.q[i] for i in which]))
        static.seq_lens_B.copy_(batch.seq_lens_B)
        static.req_pool_indices_B.copy_(batch.req_pool_indices_B)
        out = replay(4)
        assert out is not None
        out = out.clone()
        scene.check_outputs(list(out.split(1)), which)
        backend.init_forward_metadata(static, scene.table)
        assert torch.equal(attend(), out)
