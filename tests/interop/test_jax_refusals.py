"""What `paged_attention` from JAX refuses, each by one clear error when the call is traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

from fa_research.errors import BackendUnavailable, InteropError, Unsupported  # noqa: E402
from fa_research.interop.jax import paged_attention  # noqa: E402
from tests.interop.test_jax_calls import arguments, make_scene  # noqa: E402


def test_vmap_is_refused() -> None:
    arrays, static = arguments(make_scene())
    q = arrays.pop("q_THD")
    with pytest.raises(InteropError, match="jax.vmap over paged_attention.*one ragged call"):
        jax.vmap(lambda q: paged_attention(q, **arrays, **static))(jax.numpy.stack([q, q]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q_THD": lambda q: q[0]}, r"q_THD has shape \(4, 64\), it needs 3 dimensions"),
        ({"q_THD": lambda q: q[:3]}, "one query a request, there are 3 queries and 4 requests"),
        ({"q_THD": lambda q: q.astype("float16")}, "dtypes of q, k and v: float16, float32, float32"),
        ({"q_THD": lambda q: q[..., :32]}, "head dim of q is 32, that of k is 64"),
        ({"q_THD": lambda q: q[:, :3]}, "3 query heads are no multiple of 2 KV heads"),
        ({"page_table_BP": lambda t: t[:2]}, "page_table_BP has 2 rows for 4 requests"),
        ({"cache_seqlens_B": lambda x: x.astype("int16")}, "cache_seqlens_B is int16, it has to be int32"),
        ({"v_PSKV": lambda v: v[:, :-1]}, "pages, slots and heads differ"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    arrays, static = arguments(make_scene())
    ((name, apply),) = change.items()
    arrays[name] = apply(arrays[name])
    with pytest.raises(InteropError, match=says):
        jax.jit(lambda arrays: paged_attention(**arrays, **static))(arrays)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q_THD": np.zeros((4, 4, 64), "float32")}, "q_THD is a numpy.ndarray, it has to be a jax.Array"),
        ({"page_table_BP": torch.zeros(4, 4, dtype=torch.int32)}, "page_table_BP is a torch.Tensor.*to_jax"),
        ({"scale": "big"}, "scale=big: has to be a number that is known when the call is traced"),
        ({"softcap": np.ones(2)}, "softcap=.*: has to be a number"),
        ({"max_seq_len_k": -5}, "max_seq_len_k=-5: a bound of lengths is at least 1"),
        ({"max_seq_len_k": 1.5}, "max_seq_len_k=1.5: has to be a whole number"),
        ({"layer": 0.9}, "layer=0.9: has to be a whole number"),
        ({"layer": np.int64(3)}, "layer=3: the pool has layers 0 to 1"),
        ({"mask": "causal"}, "mask='causal': has to be one of fa_research.masks"),
        ({"device": "tpu"}, "device=tpu: choose one of cpu, cuda"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_kind(change: dict[str, Any], says: str) -> None:
    arrays, static = arguments(make_scene())
    with pytest.raises(InteropError, match=says):
        paged_attention(**(arrays | static | change))


def test_numbers_that_the_program_computes_are_refused() -> None:
    arrays, static = arguments(make_scene())
    for name in ("scale", "softcap", "max_seq_len_k"):
        call = lambda x, name=name: paged_attention(**arrays, **(static | {name: x}))  # noqa: E731
        with pytest.raises(InteropError, match=f"{name}=.*known when the call is traced"):
            jax.jit(call)(jax.numpy.int32(1))
        call(jax.numpy.int32(64))  # known
    flat = {name: arrays[name][1] for name in ("k_PSKD", "v_PSKV")}
    with pytest.raises(InteropError, match="layer=.*known when the call is traced"):
        jax.jit(lambda i: paged_attention(**(arrays | flat | static | {"layer": i})))(0)


def test_derivatives_are_refused() -> None:
    arrays, static = arguments(make_scene())
    with pytest.raises(InteropError, match="jax.grad through paged_attention"):
        jax.grad(lambda q: paged_attention(**(arrays | {"q_THD": q}), **static).sum())(arrays["q_THD"])


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_pool_has_not(layer: int) -> None:
    """Its pages would be somebody else's memory."""
    arrays, static = arguments(make_scene())
    with pytest.raises(InteropError, match=f"layer={layer}: the pool has layers 0 to 1"):
        paged_attention(**arrays, **(static | {"layer": layer}))


def test_what_a_backend_refuses_is_its_own_error_when_traced() -> None:
    arrays, static = arguments(make_scene())
    run = lambda name: jax.jit(lambda arrays: paged_attention(**arrays, **static, backend=name))(arrays)  # noqa: E731
    with pytest.raises(InteropError, match="backend=jax serves torch"):
        run("jax")
    with pytest.raises(ValueError, match="backend.name=flash is unknown"):
        run("flash")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="backend=fa3 is not available here"):
            run("fa3")
    arrays["q_THD"] = arrays["q_THD"][..., :36]
    arrays |= {name: arrays[name][..., :36] for name in ("k_PSKD", "v_PSKV")}
    with pytest.raises(Unsupported, match="head dim 36"):
        run("triton")
