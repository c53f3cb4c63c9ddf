"""`flex`: torch's FlexAttention reads the paged cache in place, through a block mask made of page tables.

After FlexAttention's paged attention (Dong et al. 2024, arXiv 2412.05496, section 5.2;
`torch.nn.attention.experimental._paged_attention`; attention-gym): the cache is one long sequence of slots, a block of
the block mask is a page, and the mask function turns slots into positions before it asks the mask's own predicate.
A ragged batch is cut into tiles of queries of one request each; a tile is one entry of Flex's batch.

Legend: T query tokens, B requests, N slots (of `logical_BN` pages of the pool), H query heads, K KV heads, D head dim,
V value head dim, I tiles, R queries in a tile, W pages listed for a tile.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.attention.lowering import Lowering
from fa_research.backends.base import AttentionBackend, BackendSettings
from fa_research.backends.flex_options import OPTIONS, check_options
from fa_research.backends.flex_pages import Blocks, Tiles, cut, list_pages
from fa_research.backends.flex_run import Run, compiling, make_run, without_tracing
from fa_research.errors import Unsupported
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec, Capabilities

_SMALLEST_BLOCK = 16  # keys: what a Triton dot takes


class FlexBackend(AttentionBackend):
    """On a GPU Flex is compiled (once per spec, number of tiles and width of the table, the last two in steps) and
    reads the listed pages alone; it plans on the device, so a decode step can be captured.
    On the CPU it computes every score of the pool, with NaN among the values taken as zero, because it multiplies
    those of others by an exact zero.

    `backend.options.block_m`, `block_n`, `num_warps` and `num_stages` go to its Triton kernels."""

    name = "flex"
    option_names = frozenset(OPTIONS)
    combine_kernels = ("triton_per_", "triton_red_", "triton_poi_")  # the template itself is triton_tem_

    def __init__(self, settings: BackendSettings, specs: Any) -> None:
        super().__init__(settings, specs)
        check_options(settings)
        self._runs: dict[tuple[Any, ...], Run] = {}
        self._num_slots = 0  # of the pool; known from the first pass on
        # torch.compile's backend; None: nothing is compiled.
        self.compiler = "inductor" if settings.device.type == "cuda" else None

    @classmethod
    def unavailable(cls, settings: BackendSettings) -> tuple[str, ...]:
        if settings.device.type != "cuda":
            return ()
        from torch.utils._triton import has_triton

        if has_triton():
            return ()
        return ("torch.compile finds no Triton for this GPU; FlexAttention's kernels are written in it",)

    @property
    def capabilities(self) -> Capabilities:
        on_gpu = self.settings.device.type == "cuda"
        dtypes = {"float16", "bfloat16", "float32"}
        return Capabilities(
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset(dtypes if on_gpu else dtypes | {"float64"}),
            mask_features=frozenset({"predicate"}),
            own_v_head_dim=True,
            page_size_multiple=_SMALLEST_BLOCK if on_gpu else 1,
            softcap=True,
            returns_lse=True,
        )

    def lower(self, spec: AttentionSpec) -> Lowering:
        lowering, s, reasons = super().lower(spec), self.settings, []
        on_gpu, group = s.device.type == "cuda", spec.num_heads // spec.num_kv_heads
        if (
            on_gpu
            and not 16 <= min(spec.head_dim, spec.v_head_dim) <= max(spec.head_dim, spec.v_head_dim) <= 256
        ):
            reasons.append(f"head dim {spec.head_dim}, {spec.v_head_dim} of values: takes 16 to 256 on a GPU")
        if on_gpu and s.page_size > 64 and s.page_size % 64:  # its decode kernel takes 64 keys at a time
            reasons.append(
                f"kv.page_size={s.page_size}: FlexAttention takes 16, 32, 48 and multiples of 64 on a GPU"
            )
        if s.num_splits and not on_gpu:
            reasons.append(f"backend.num_splits={s.num_splits}: on the CPU there are no splits; use 0")
        elif s.num_splits and group & (group - 1):
            reasons.append(
                f"backend.num_splits={s.num_splits}: FlexAttention splits keys only where a power of two query heads "
                f"share a KV head, here {group}; use 0"
            )
        if s.deterministic:
            reasons.append("backend.deterministic=true: FlexAttention's splits go by the size of the batch")
        return replace(lowering, reasons=lowering.reasons + tuple(reasons))

    @property
    def notes(self) -> tuple[str, ...]:
        if self.settings.device.type == "cuda":
            return ()
        without = "" if not self.settings.options else ", and backend.options change nothing"
        return (
            f"backend=flex: on the CPU it materialises every score of the pool; for correctness only{without}",
        )

    def plan(self, metadata: FlashAttentionMetadata, lowering: Lowering) -> None:
        if self._num_slots:
            num_tokens = sum(metadata.extend_seq_lens_cpu) or metadata.batch_size
            self._planned(metadata, lowering.spec, num_tokens, self._num_slots)

    def attend(self, call: AttentionCall) -> AttentionOutput:
        assert call.sinks_H is None, "sinks are an epilogue"
        q_THD, k_cache_NKD, v_cache_NKV = call.q_THD, call.k_cache_NKD, call.v_cache_NKV
        metadata, spec, on_gpu = call.metadata, call.spec, q_THD.is_cuda
        if on_gpu:
            self._check_pool(k_cache_NKD, v_cache_NKV)
        self._num_slots = k_cache_NKD.shape[0]
        tiles, blocks = self._planned(metadata, spec, q_THD.shape[0], self._num_slots)
        q_IRHD = q_THD[:, None] if tiles.token_IR is None else q_THD[tiles.token_IR]
        tensors = (
            q_IRHD.transpose(1, 2),
            k_cache_NKD.transpose(0, 1)[None],
            (v_cache_NKV if on_gpu else v_cache_NKV.nan_to_num(nan=0.0)).transpose(0, 1)[None],
            tiles.request_I, tiles.first_I, tiles.logical_BN, metadata.cache_seqlens_int32_B,
            blocks.num_partial_I, blocks.partial_IW, blocks.num_full_I, blocks.full_IW,
        )  # fmt: skip
        out_IHRV, lse_IHR = self._run(spec, metadata.page_size, call.return_lse, tensors)
        return _by_token(out_IHRV, tiles), None if lse_IHR is None else _by_token(lse_IHR.float(), tiles)

    def _check_pool(self, k_cache_NKD: Tensor, v_cache_NKV: Tensor) -> None:
        if max(k_cache_NKD.numel(), v_cache_NKV.numel()) > 2**31:
            numel = f"{k_cache_NKD.numel():,} elements in one layer's keys"
            raise Unsupported(
                self.name, [f"{numel}: FlexAttention's kernels count in 32 bits; use fewer kv.num_pages"]
            )

    def _planned(
        self, metadata: FlashAttentionMetadata, spec: AttentionSpec, num_tokens: int, num_slots: int
    ) -> tuple[Tiles, Blocks]:
        """The tiles of the pass and the pages listed for them, made once a pass and kind of layer. `plan` makes them,
        but in the first pass, when only a layer knows how large the pool is, and where a JAX call pads its tokens."""
        plans = metadata.plans
        cut_key = (self.name, num_tokens, num_slots)
        key = (*cut_key, spec.mask)
        if cut_key not in plans:
            plans[cut_key] = cut(metadata, num_tokens, num_slots)
        if key not in plans:
            plans[key] = list_pages(metadata, plans[cut_key], spec.mask)
        return plans[cut_key], plans[key]

    def _run(
        self, spec: AttentionSpec, page_size: int, return_lse: bool, tensors: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.compiler is None:
            with without_tracing():
                return make_run(spec, page_size, return_lse, {})(*tensors)
        inference = torch.is_inference_mode_enabled()  # dynamo's guards tell such tensors apart
        shapes = (None if t is None else (t.shape, t.stride(), t.is_inference()) for t in tensors)
        key = (spec, return_lse, inference, torch.is_grad_enabled(), *shapes)
        fresh = key not in self._runs
        if fresh:
            assert tensors[0] is not None
            options = self._kernel_options(spec, page_size, decode=tensors[0].shape[2] == 1)
            run = make_run(spec, page_size, return_lse, options)
            self._runs[key] = torch.compile(run, fullgraph=True, dynamic=False, backend=self.compiler)
        with compiling() if fresh else nullcontext():
            return self._runs[key](*tensors)

    def _kernel_options(self, spec: AttentionSpec, page_size: int, decode: bool) -> dict[str, Any]:
        """Flex's own choice, but for the keys it takes at a time: they must lie in one page and fit shared memory."""
        wide, full = max(spec.head_dim, spec.v_head_dim) > 128, self.settings.dtype is torch.float32
        options: dict[str, Any] = {"BLOCK_N": min(page_size & -page_size, 32 if wide or full else 64)}
        if full and not decode:
            options["BLOCK_M"] = 32
        if self.settings.num_splits and decode:
            options["SPLIT_KV"] = self.settings.num_splits
        return options | {OPTIONS[name]: value for name, value in self.settings.options.items()}


def _by_token(result: Tensor, tiles: Tiles) -> Tensor:
    """[T, H, ...] of [I, H, R, ...]."""
    rows = result.transpose(1, 2).flatten(0, 1)
    return rows if tiles.row_T is None else rows[tiles.row_T]
