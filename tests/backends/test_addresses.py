"""Queries that do not lie as kernels want them, and sinks in another dtype than kernels take."""

from __future__ import annotations

import pytest
import torch

from fa_research import backends
from fa_research.attention.layer import PagedAttention
from fa_research.backends.base import ALIGNMENT, aligned
from fa_research.masks import Causal
from tests.helpers import DEVICES, Scene, make_spec

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
LENS = {"extend": ((30, 5), (0, 40)), "decode": ((30, 1), (7, 1))}


def view(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The same numbers as a view of a buffer with more columns on both sides."""
    wide = torch.full((x.shape[0], before + x[0].numel() + after), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, before : wide.shape[1] - after] = x.flatten(1)
    return wide[:, before : wide.shape[1] - after].unflatten(1, x.shape[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize(("before", "after"), [(0, 3), (1, 0), (3, 5)])
@pytest.mark.parametrize("name", backends.names())
def test_rows_that_begin_anywhere(name: str, before: int, after: int, lens: str, device: str) -> None:
    """FA3's TMA destroyed the CUDA context over rows that do not begin on 16 bytes."""
    scene = Scene(make_spec((4, 2), 64), LENS[lens], 16, DTYPE[device], device, decode=lens == "decode")
    backend = scene.backend(name)
    q, k, v = (view(x, before, after) for x in scene.qkv())
    batch = scene.batch()
    backend.init_forward_metadata(batch, scene.table)
    attend = PagedAttention(backend, scene.cache.kv, batch, backend.lowerings)
    out_THV = attend(scene.layer_id, q, k, v, rope=None, sinks_H=None)
    scene.check_outputs(list(out_THV.split([new for _, new in scene.lens])), range(2))


def test_only_what_must_be_is_copied() -> None:
    q = torch.randn(3, 4, 64, dtype=torch.bfloat16)
    assert aligned(q) is q
    fused = view(q, 8, 8)
    assert aligned(fused) is fused
    for odd in (view(q, 0, 3), view(q, 1, 0), q.transpose(1, 2).contiguous().transpose(1, 2)):
        copy = aligned(odd)
        assert copy.data_ptr() % ALIGNMENT == 0 and copy.is_contiguous() and torch.equal(copy, q)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("name", backends.names())
def test_sinks_of_full_precision_are_not_rounded(name: str, lens: str, device: str) -> None:
    """Sinks near 9.5 that lie between two bfloat16 numbers, and are most of the softmax."""
    spec = make_spec((4, 2), 64, Causal(), has_sink=True)
    scene = Scene(spec, LENS[lens], 16, DTYPE[device], device, decode=lens == "decode")
    scene.sinks = torch.tensor([9.53, 9.47, 9.59, 9.41], dtype=torch.float32, device=device)
    scene.check(scene.backend(name))
