"""FlashInfer's wrappers by the definition of attention, from the arguments that FlashInfer takes: for machines where it
does not run. What the host planned has to agree with what the device holds when a kernel runs.

Legend: T query tokens, H query heads, K KV heads, D head dim, P pages, S slots in a page.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.attention.reference import attention
from fa_research.backends.flashinfer import FlashInferBackend
from fa_research.masks import Causal, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec, Capabilities


class _Wrapper:
    """`calls` are the names of the plans made, `planned` the lengths that the last one saw."""

    made: list[_Wrapper] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8
        self.options, self.calls = options, list[str]()
        self.captured = options.get("use_cuda_graph", False)
        self.indptr = options.get("paged_kv_indptr_buffer")
        self.indices = options.get("paged_kv_indices_buffer")
        self.last_page_len = options.get("paged_kv_last_page_len_buffer")
        self._pin_memory_int_workspace_buffer = torch.empty(0)
        self.made.append(self)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def _plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        heads: tuple[int, int, int],
        page_size: int,
        *,
        copy: bool,
        mask: Mask,
        sm_scale: float,
        logits_soft_cap: float,
        **dtypes: Any,
    ) -> None:
        assert indptr.device.type == last_page_len.device.type == "cpu", "else planning waits for the device"
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert self._pin_memory_int_workspace_buffer.numel(), "planned through memory of its own"
        if not self.captured:
            self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len
        elif copy:
            self.indptr.copy_(indptr)
            self.last_page_len.copy_(last_page_len)
            self.indices[: len(indices)].copy_(indices)
        num_heads, num_kv_heads, head_dim = heads
        shape = (num_heads, num_kv_heads, head_dim, head_dim, sm_scale, logits_soft_cap)
        self.spec, self.page_size = AttentionSpec(*shape, mask=mask), page_size
        self.planned = [*zip(indptr.diff().tolist(), last_page_len.tolist(), strict=True)]
        self._plan_info = object()

    def run(
        self, q_THD: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor, return_lse: bool
    ) -> Any:
        k_PSKD, v_PSKD = paged_kv_cache
        assert k_PSKD.shape[1] == self.page_size
        indptr, last = self.indptr.tolist(), self.last_page_len.tolist()
        now = [*zip(self.indptr.diff().tolist(), last, strict=True)]
        assert self.planned == now, "the plan is of another step"
        lses, start = [], 0
        for i, new in enumerate(self.query_lens(len(last))):
            pages = self.indices[indptr[i] : indptr[i + 1]].long()
            total = (len(pages) - 1) * self.page_size + last[i]
            k, v = (x[pages].flatten(0, 1)[:total] for x in (k_PSKD, v_PSKD))
            q = q_THD[start : start + new]
            positions = torch.arange(total - new, total)
            out[start : start + new], lse = attention(
                q, k, v, positions, self.spec, compute_dtype=torch.float64
            )
            lses.append(lse)
            start += new
        assert start == q_THD.shape[0]
        return (out, torch.cat(lses).float() / math.log(2)) if return_lse else out

    def query_lens(self, batch_size: int) -> list[int]:
        return [1] * batch_size


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, window_left: int, disable_split_kv: bool, **more: Any,
    ) -> None:  # fmt: skip
        self.calls.append("plan")
        self._decode(
            indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim), page_size, window_left,
            copy=True, **more,
        )  # fmt: skip

    def _decode(self, *args: Any, copy: bool, **more: Any) -> None:
        *args, window_left = args  # type: ignore[assignment]
        mask = Causal() if window_left < 0 else SlidingWindow(window_left + 1)
        self._plan(*args, copy=copy, mask=mask, **more)


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper, indptr: Tensor, indices: Tensor, last_page_len: Tensor,
    num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int,
    disable_split_kv: bool, **more: Any,
) -> None:  # fmt: skip
    """As `plan` of a wrapper that was planned before, without the copies to its buffers."""
    assert self.captured
    self.calls.append("fast_decode_plan")
    heads = (num_qo_heads, num_kv_heads, head_dim)
    self._decode(indptr, indices, last_page_len, heads, page_size, window_left, copy=False, **more)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, window_left: int,
        max_token_per_sequence: int, disable_split_kv: bool, **more: Any,
    ) -> None:  # fmt: skip
        assert qo_indptr.device.type == "cpu"
        self.calls.append("plan")
        self.lens = qo_indptr.diff().tolist()
        assert max(self.lens) == max_token_per_sequence
        mask = Full() if not causal else Causal() if window_left < 0 else SlidingWindow(window_left + 1)
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self._plan(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, page_size, copy=True, mask=mask, **more
        )  # fmt: skip

    def query_lens(self, batch_size: int) -> list[int]:
        assert len(self.lens) == batch_size
        return self.lens


class FlashInferOnCPU(FlashInferBackend):
    """All of the backend but the kernels."""

    name = "flashinfer_on_cpu"

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}))


def install(monkeypatch: pytest.MonkeyPatch) -> list[_Wrapper]:
    """Stand in for the package `flashinfer`; the wrappers made from now on are listed in what comes back."""
    monkeypatch.setattr(_Wrapper, "made", [])
    module = ModuleType("flashinfer")
    for part in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, fast_decode_plan):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return _Wrapper.made
