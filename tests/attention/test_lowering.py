"""What a layer asks against what a backend can: native, rewritten, or every reason why not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fa_research.attention.lowering import Kind, Lowering, lower
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec, Capabilities

BANDS = frozenset({"causal", "full", "window", "chunk"})
PLAIN = Capabilities(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float16", "float32"}),
    mask_features=BANDS - {"chunk"},
    head_dims=frozenset({64, 128}),
    returns_lse=True,
)


@dataclass(frozen=True)
class _NoBand(Mask):
    """Every other key: no band says it."""

    name: ClassVar[str] = "every_other"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & ((q_pos - k_pos) % 2 == 0)

    def band(self) -> None:
        return None


def spec(**changes: Any) -> AttentionSpec:
    return dataclasses.replace(AttentionSpec(4, 2, 64, 64, 0.125), **changes)


def lowered(asked: AttentionSpec, can: Capabilities = PLAIN, page_size: int = 16, **where: Any) -> Lowering:
    place = {"dtype": torch.float16, "device": torch.device("cpu"), **where}
    return lower(asked, can, page_size=page_size, **place)


def can(**changes: Any) -> Capabilities:
    return dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(5)], ids=lambda m: m.name)
def test_native(mask: Mask) -> None:
    asked = spec(mask=mask)
    assert lowered(asked) == Lowering(asked)
    assert lowered(asked).kind is Kind.NATIVE and lowered(asked).rewrites == ()


@pytest.mark.parametrize("features", [BANDS, frozenset({"predicate"})], ids=["bands", "predicate"])
def test_chunks_are_native_where_the_kernel_has_them(features: frozenset[str]) -> None:
    """Also where the page size does not divide the chunk."""
    asked = spec(mask=Chunked(10))
    assert lowered(asked, can(mask_features=features)) == Lowering(asked)


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_chunks_become_requests(page_size: int) -> None:
    result = lowered(spec(mask=Chunked(256), softcap=0.0), page_size=page_size)
    assert result.kind is Kind.REWRITTEN and result.rewrites == ("chunks_as_requests",)
    assert result.chunk == 256 and result.spec == spec(mask=Causal())


@pytest.mark.parametrize(("chunk", "page_size"), [(24, 16), (8, 16), (128, 3), (127, 128)])
def test_chunks_off_page_borders_are_refused(chunk: int, page_size: int) -> None:
    result = lowered(spec(mask=Chunked(chunk)), page_size=page_size)
    (reason,) = result.reasons
    assert result.kind is Kind.UNSUPPORTED
    assert f"chunks of {chunk} tokens" in reason and f"kv.page_size={page_size}" in reason


def test_a_sink_becomes_an_epilogue() -> None:
    result = lowered(spec(has_sink=True))
    assert result.rewrites == ("sink_epilogue",) and result.sink_epilogue
    assert result.spec == spec(has_sink=False)  # the kernel must not apply it a second time


def test_a_sink_and_chunks_together() -> None:
    result = lowered(spec(has_sink=True, mask=Chunked(32)))
    assert result.rewrites == ("chunks_as_requests", "sink_epilogue")
    assert result.spec == spec()


def test_a_native_sink_stays_in_the_kernel() -> None:
    asked = spec(has_sink=True)
    assert lowered(asked, can(sinks=True, returns_lse=False)) == Lowering(asked)


def test_a_sink_without_an_lse_is_refused() -> None:
    (reason,) = lowered(spec(has_sink=True), can(returns_lse=False)).reasons
    assert "sinks" in reason and "LSE" in reason


@pytest.mark.parametrize(
    ("asked", "changes", "where", "needle"),
    [
        (spec(), {}, {"device": torch.device("cuda")}, "device cuda: runs on cpu only"),
        (spec(), {}, {"dtype": torch.bfloat16}, "dtype bfloat16: takes float16, float32"),
        (spec(), {"layouts": frozenset()}, {}, "KV layout mha"),
        (spec(), {"page_size_multiple": 256}, {}, "kv.page_size=16: must be a multiple of 256"),
        (spec(softcap=30.0), {}, {}, "softcap=30.0"),
        (spec(head_dim=80, v_head_dim=80), {}, {}, "head dim 80: takes 64, 128"),
        (
            spec(head_dim=12, v_head_dim=12),
            {"head_dims": frozenset(range(8, 257, 8))},
            {},
            "head dim 12: takes multiples of 8 up to 256",
        ),
        (spec(v_head_dim=512), {"own_v_head_dim": True}, {}, "head dim 512"),
        (
            spec(v_head_dim=128),
            {},
            {},
            "value head dim 128: the kernel has one head dim, that of the keys is 64",
        ),
        (spec(mask=SlidingWindow(4)), {"mask_features": frozenset({"causal"})}, {}, "lacks window"),
        (spec(mask=Full()), {"mask_features": frozenset({"causal"})}, {}, "lacks full"),
        (spec(mask=Chunked(32)), {"mask_features": frozenset({"full"})}, {}, "lacks causal, chunk"),
        (spec(mask=_NoBand()), {}, {}, "every_other"),
    ],
)
def test_one_reason(asked: AttentionSpec, changes: Any, where: Any, needle: str) -> None:
    result = lowered(asked, can(**changes), **where)
    assert result.kind is Kind.UNSUPPORTED
    (reason,) = result.reasons
    assert needle in reason


def test_every_reason_is_listed_and_not_only_the_first() -> None:
    asked = spec(head_dim=80, v_head_dim=80, softcap=1.0, mask=Chunked(10), has_sink=True)
    nothing = can(returns_lse=False, page_size_multiple=32, layouts=frozenset())
    reasons = lowered(asked, nothing, dtype=torch.float64, device=torch.device("cuda")).reasons
    for needle in ("device", "dtype", "layout", "kv.page_size", "softcap", "head dim", "sinks", "chunked"):
        assert any(needle in reason for reason in reasons), needle
    assert len(reasons) == 8


def test_predicate_backends_serve_masks_without_a_band() -> None:
    asked = spec(mask=_NoBand())
    assert lowered(asked, can(mask_features=frozenset({"predicate"}))) == Lowering(asked)
