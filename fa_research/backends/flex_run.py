"""One call of FlexAttention, and what it is run in with a compiler and without.

Legend: N slots (of `logical_BN` pages of the pool), B requests, H query heads, K KV heads, D head dim, V value head
dim, I tiles, R queries in a tile, W pages listed for a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from fa_research.backends.flex_pages import TILE
from fa_research.spec import AttentionSpec

Run = Callable[..., tuple[Tensor, Tensor | None]]


def make_run(spec: AttentionSpec, page_size: int, return_lse: bool, options: dict[str, Any]) -> Run:
    """Flex for one spec, as a function of tensors alone: what is compiled."""
    mask = spec.mask
    cap = _cap(spec.softcap) if spec.softcap else None

    def run(
        q_IHRD: Tensor, k_1KND: Tensor, v_1KNV: Tensor,
        request_I: Tensor, first_I: Tensor, logical_BN: Tensor, lens_B: Tensor,
        num_partial_I: Tensor, partial_IW: Tensor, num_full_I: Tensor | None, full_IW: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        def sees(i: Tensor, h: Tensor, r: Tensor, slot: Tensor) -> Tensor:
            page = logical_BN[request_I[i], slot // page_size]
            k_pos = page * page_size + slot % page_size
            return (page >= 0) & (k_pos < lens_B[request_I[i]]) & mask.allows(first_I[i] + r, k_pos)

        blocks = (num_partial_I, partial_IW, num_full_I, full_IW)
        block_mask = _block_mask(*blocks, sees, page_size, (q_IHRD.shape[2], k_1KND.shape[2]))
        out, aux = flex.flex_attention(
            q_IHRD, k_1KND, v_1KNV, cap, block_mask, spec.scale,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
            kernel_options=cast(Any, options),
            return_aux=flex.AuxRequest(lse=return_lse),
        )  # fmt: skip
        return out, aux.lse

    return run


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, i: Tensor, h: Tensor, r: Tensor, slot: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _block_mask(
    num_partial_I: Tensor, partial_IW: Tensor, num_full_I: Tensor | None, full_IW: Tensor | None,
    sees: Callable[..., Tensor], page_size: int, lengths: tuple[int, int],
) -> flex.BlockMask:  # fmt: skip
    return flex.BlockMask.from_kv_blocks(
        num_partial_I[:, None, None],
        partial_IW[:, None, None],
        None if num_full_I is None else num_full_I[:, None, None],
        None if full_IW is None else full_IW[:, None, None],
        BLOCK_SIZE=(TILE, page_size),
        mask_mod=sees,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


@contextmanager
def without_tracing() -> Iterator[None]:
    """Off the GPU Flex has dynamo trace every mask and shape anew, for the same arithmetic; its own switch for
    debugging leaves that out, and with it the warning that nothing was compiled."""
    before = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@contextmanager
def compiling() -> Iterator[None]:
    """Every shape is one entry of dynamo's cache, which by default takes eight. Inductor says at its first compilation
    that float32 could be multiplied in TF32: float32 is what was asked for."""
    import torch._dynamo

    limits = torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)
    with limits, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        yield
