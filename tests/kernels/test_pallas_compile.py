"""The Pallas kernel is lowered to Triton for a GPU, on a machine without one: what Triton lacks words for shows."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")

from fa_research.kernels.pallas_decode import Config, paged_decode  # noqa: E402


@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
@pytest.mark.parametrize("rows", [1 << 12, 1 << 22], ids=["small", "beyond 4 GiB"])
@pytest.mark.parametrize(
    "more", [{}, {"softcap": 4.0}, {"window": 100}, {"chunk": 256, "config": Config(cuts=1)}], ids=str
)
def test_it_lowers_to_triton(page_size: int, rows: int, more: dict[str, Any]) -> None:
    def array(*shape: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    pool = array(rows * page_size // page_size, 8, 128, dtype="bfloat16")
    args = (array(64, 32, 128, dtype="bfloat16"), pool, pool, array(), array(64, 64), array(64))
    traced = paged_decode.trace(*args, page_size=page_size, scale=0.1, **more)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and "paged_decode" in text
