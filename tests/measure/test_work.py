"""Bytes and operations against counting what the mask's own predicate allows, pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from fa_research.batch import ForwardMode
from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.measure.work import attention_work
from fa_research.spec import AttentionSpec
from fa_research.workloads.base import Pass


@dataclass(frozen=True)
class EveryThird(Mask):
    """A mask that is no band: the query's own key, and every third before it."""

    name: ClassVar[str] = "every_third"

    def allows(self, q_pos: Any, k_pos: Any) -> Any:
        return (k_pos <= q_pos) & ((q_pos - k_pos) % 3 == 0)

    def band(self) -> None:
        return None


MASKS: list[Mask] = [
    EveryThird(),
    Causal(),
    Full(),
    *map(SlidingWindow, (1, 2, 7, 100)),
    *map(Chunked, (1, 4, 8, 100)),
]
LENS = [(1, 1), (2, 1), (8, 1), (9, 1), (17, 1), (5, 5), (8, 8), (9, 4), (16, 9), (33, 20)]


def counted(mask: Mask, seq_len: int, extend_len: int) -> tuple[int, int]:
    """(keys that some query sees, pairs that are allowed)."""
    queries = range(seq_len - extend_len, seq_len)
    pairs = [(q, k) for q, k in itertools.product(queries, range(seq_len)) if mask.allows(q, k)]
    return len({k for _, k in pairs}), len(pairs)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("seq_len", "extend_len"), LENS)
def test_one_request_by_counting(mask: Mask, seq_len: int, extend_len: int) -> None:
    spec = AttentionSpec(6, 2, 64, 32, 1.0, mask=mask)
    work = attention_work(
        Pass([1], [seq_len], [extend_len], extend_len, ForwardMode.EXTEND), [spec], itemsize=2
    )
    keys, pairs = counted(mask, seq_len, extend_len)
    assert work.flops == 2 * pairs * 6 * (64 + 32)
    kv_elements = keys * 2 * (64 + 32)
    q_and_out_elements = extend_len * 6 * (64 + 32)
    assert work.bytes == 2 * (kv_elements + q_and_out_elements)


def test_requests_and_layers_add_up() -> None:
    specs = [AttentionSpec(4, 2, 64, 64, 1.0, mask=mask) for mask in (Causal(), SlidingWindow(5))]
    whole = attention_work(Pass([1, 2], [9, 30], [3, 30], 40, ForwardMode.MIXED), specs, 4)
    parts = [
        attention_work(Pass([1], [seq_len], [new], new, ForwardMode.EXTEND), [spec], 4)
        for spec in specs
        for seq_len, new in ((9, 3), (30, 30))
    ]
    assert whole.bytes == sum(part.bytes for part in parts)
    assert whole.flops == sum(part.flops for part in parts)


def test_llama_8b_by_hand() -> None:
    """One decode step of 64 requests at 4k: 32 layers x 64 x 4096 tokens x 8 heads x 256 elements x 2 bytes."""
    specs = [AttentionSpec(32, 8, 128, 128, 1.0)] * 32
    work = attention_work(Pass([1] * 64, [4096] * 64, [1] * 64, 64, ForwardMode.DECODE), specs, 2)
    cache = 32 * 64 * 4096 * 8 * 256 * 2
    assert cache < work.bytes < 1.001 * cache
    assert work.flops == 4 * 32 * 64 * 4096 * 32 * 128
