"""Wrappers of the memory that XLA passes to custom calls."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("jax")

from fa_research.interop import ffi  # noqa: E402

CPU = torch.device("cpu")
SHAPES = (((2, 3), torch.float32), ((6,), torch.int32)), (((3, 2), torch.float32),)


def call() -> ffi.Call:
    return ffi.Call(lambda inputs, outputs: None, CPU, *SHAPES)


def test_each_address_is_wrapped_once_whatever_the_others_are() -> None:
    made, pool = call(), torch.arange(6, dtype=torch.int32)
    queries, outs = torch.randn(4, 2, 3), torch.zeros(4, 3, 2)
    seen = set()
    for q, out in zip(queries, outs, strict=True):
        (got_q, got_pool), (got_out,) = made.tensors((q.data_ptr(), pool.data_ptr(), out.data_ptr()))
        assert torch.equal(got_q, q) and torch.equal(got_pool, pool)
        got_out.copy_(got_q.view(3, 2))
        seen.add(id(got_pool))
    assert torch.equal(outs, queries.view(4, 3, 2)) and len(seen) == 1
    assert len(made.wrapped) == 4 + 1 + 4


def test_one_address_as_two_arguments_has_the_shape_of_each() -> None:
    memory = torch.zeros(6)
    (a, b), (out,) = call().tensors((memory.data_ptr(),) * 3)
    assert [(tuple(x.shape), x.dtype) for x in (a, b, out)] == [*SHAPES[0], *SHAPES[1]]


def test_addresses_are_forgotten_and_wrapped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "_MAX_WRAPPED", 2)
    made, memory = call(), torch.zeros(9, 6)
    for i, row in enumerate(memory):
        (a, _), (out,) = made.tensors((row.data_ptr(),) * 3)
        a.fill_(i)
        assert (out == i).all() and len(made.wrapped) <= 2
    assert torch.equal(memory[:, 0], torch.arange(9.0))
