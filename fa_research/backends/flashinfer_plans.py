"""What FlashInfer's plans need beside their arguments: pages as compressed rows, scratch memory, and a safe way for a
plan from the host to the device.

Legend: B requests, B1 = B + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fa_research.kernels import ops
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A batch's pages as FlashInfer takes them, int32: on the device, and what the host plans with."""

    indptr_B1: Tensor
    indices: Tensor
    last_page_len_B: Tensor
    indptr_cpu: Tensor
    last_page_len_cpu: Tensor


def paged_rows(metadata: FlashAttentionMetadata) -> PagedRows:
    """Made once a pass, for every kind of layer; of a captured step in buffers that stay. The host's part comes from
    the host's lengths, so nothing waits for the device."""
    rows: PagedRows | None = metadata.plans.get(PagedRows)
    if rows is None:
        rows = metadata.plans[PagedRows] = _make_rows(metadata)
    return rows


def _make_rows(metadata: FlashAttentionMetadata) -> PagedRows:
    lens, page_size = metadata.seq_lens_cpu, metadata.page_size
    assert len(lens) == metadata.batch_size, "planning on the host takes the host's lengths"
    pages = [-(-n // page_size) for n in lens]
    last = [n - (count - 1) * page_size for n, count in zip(lens, pages, strict=True)]
    table_BP, kept = metadata.page_table_BP, metadata.kept
    if kept is None:
        buffers = _buffers(len(lens), sum(pages), table_BP.device)
    else:
        if PagedRows not in kept:
            kept[PagedRows] = _buffers(len(lens), table_BP.numel(), table_BP.device)
        buffers = kept[PagedRows]
    indptr_B1, indices, last_page_len_B = buffers
    ops.compact_pages(
        table_BP, metadata.cache_seqlens_int32_B, page_size, indptr_B1, indices, last_page_len_B
    )
    return PagedRows(*buffers, cumulative(pages), torch.tensor(last, dtype=torch.int32))


def _buffers(batch_size: int, num_pages: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # passes in that mode write to them, and passes outside
        indptr_B1, indices, last_page_len_B = (
            torch.empty(n, dtype=torch.int32, device=device) for n in (batch_size + 1, num_pages, batch_size)
        )
    return indptr_B1, indices, last_page_len_B


def cumulative(counts: Sequence[int]) -> Tensor:
    """0 and the running sums, int32 on the host."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


class Staging:
    """Pinned buffers on a plan's way to the device, in turns. FlashInfer copies a plan without waiting for the copy, so
    that the next plan in the same buffer could overtake it; a buffer is used again once its copy has happened."""

    def __init__(self, count: int, num_bytes: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self._buffers = [
                torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(count)
            ]
        self._copied = [torch.cuda.Event() for _ in range(count)] if self._on_gpu else []
        self._turn = 0

    @contextmanager
    def lent_to(self, wrapper: Any, *, cleared: bool = False) -> Iterator[None]:
        """Inside, the wrapper plans through one of the buffers, which may be cleared first."""
        assert hasattr(wrapper, "_pin_memory_int_workspace_buffer"), "this FlashInfer plans in other ways"
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        if self._on_gpu:
            self._copied[turn].synchronize()  # many plans old: it waits only for a device that is far behind
        wrapper._pin_memory_int_workspace_buffer = self._buffers[turn]
        if cleared:
            self._buffers[turn].zero_()
        yield
        if self._on_gpu:
            self._copied[turn].record()


class Partials:
    """Device memory for the partial results of split keys. Kernels use it one after the other, so all share it; where
    more is needed, new plans get a larger one and captured graphs keep theirs."""

    _AT_LEAST = 128 << 20  # FlashInfer's recommendation

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, spec: AttentionSpec, tile: int, captured_batch_size: int = 0) -> Tensor:
        """Enough for a plan of such layers; for the arguments see `partial_bytes`."""
        num_bytes = partial_bytes(spec, self._num_sms, tile, captured_batch_size)
        if self._buffer.numel() < num_bytes:
            with torch.inference_mode(False):
                size = max(num_bytes, self._AT_LEAST)
                self._buffer = torch.zeros(size, dtype=torch.uint8, device=self._device)
        return self._buffer


def partial_bytes(spec: AttentionSpec, num_sms: int, tile: int, captured_batch_size: int = 0) -> int:
    """An upper bound of what a plan asks of `Partials`: float32 outputs and their LSE for each piece of work of `tile`
    rows, of which there are two for each SM, and in a captured step at least as many as tiles of queries."""
    group = spec.num_heads // spec.num_kv_heads
    tiles = captured_batch_size * (2 + group // tile)
    pieces = max(2 * num_sms // spec.num_kv_heads, tiles, 1)
    return spec.num_heads * pieces * tile * (spec.head_dim + 1) * 4 + 4096
