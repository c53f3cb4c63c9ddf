"""A pass without requests, and sizes that cannot be, in what users build without a config."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fa_research import backends
from fa_research.attention.layer import PagedAttention
from fa_research.batch import ForwardBatch, ForwardMode, extend_batch
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.decode_state import DecodeState
from fa_research.engine.token_reader import TokenReader
from fa_research.errors import ConfigError
from fa_research.kv_cache import PagedAllocator
from fa_research.masks.chunked import Chunked
from fa_research.metadata import FlashAttentionMetadata
from tests.helpers import DEVICES, Scene, make_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.EXTEND])
@pytest.mark.parametrize("name", backends.names())
def test_a_pass_without_requests_has_an_empty_result(name: str, mode: ForwardMode, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scene = Scene(make_spec(mask=Chunked(4)), ((5, 1),), 16, dtype, device, decode=True)
    backend = scene.backend(name)
    ids, rows = (torch.empty(0, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
    lens = None if mode is ForwardMode.DECODE else rows
    batch = ForwardBatch(mode, ids, ids, rows, rows, ids, 1, 8, lens)
    backend.init_forward_metadata(batch, scene.table)
    attend = PagedAttention(backend, scene.cache.kv, batch, backend.lowerings)
    q, k, v = (part[:0] for part in scene.qkv())
    for layer in range(2):
        out = attend(layer, q, k, v, rope=None, sinks_H=None)
        assert out.shape == (0, 4, 64) and out.dtype == dtype
    caches = scene.cache.kv.k(1), scene.cache.kv.v(1)
    _, lse = backend.forward(q, *caches, backend.lowerings[1], return_lse=True)
    assert lse is not None and lse.shape == (0, 4) and lse.dtype == torch.float32
    scene.run(backend)  # and the next pass is as ever


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PagedAllocator(0, 16), "kv.num_pages=0"),
        (lambda: PagedAllocator(4, 0), "kv.page_size=0"),
        (lambda: FlashAttentionMetadata.allocate(-1, 8, 16, CPU), "batch_size=-1"),
        (lambda: FlashAttentionMetadata.allocate(1, 8, 0, CPU), "kv.page_size=0"),
        (lambda: DecodeState(-1, CPU), "max_batch_size=-1"),
        (lambda: TokenReader(-1, CPU), "batch_size=-1"),
        (lambda: AttentionStack([], max_tokens=1, dtype=torch.float32, device=CPU, seed=0), "layers=0"),
        (lambda: AttentionStack([make_spec()], max_tokens=0, dtype=torch.float32, device=CPU, seed=0), "max_tokens=0"),
        (lambda: extend_batch(torch.zeros(2, 16, dtype=torch.int32), [], [], []), "at least one new token"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_one_line(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
