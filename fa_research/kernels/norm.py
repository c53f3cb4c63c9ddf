"""RMSNorm over the last dimension, alone or fused with the residual add.

Shapes: T tokens, E width of a row. One pass: a row is read once, stays in registers, and is written once.
Idea: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the fusion with the residual add is
what every serving engine does, because both are bound by memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 65536


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    heads,
    x_stride_t,
    x_stride_h,
    out_stride_t,
    out_stride_h,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // heads).to(tl.int64)
    head = row % heads
    col = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (col < WIDTH)[None, :]
    x = tl.load(
        x_ptr + (token * x_stride_t + head * x_stride_h)[:, None] + col[None, :], mask=mask, other=0.0
    )
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32)  # in flight during the sum
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    out = x * scale[:, None] * weight[None, :]
    out_at = out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + col[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride_t,
    residual_stride_t,
    out_stride_t,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (col < WIDTH)[None, :]
    x = tl.load(x_ptr + (row * x_stride_t)[:, None] + col[None, :], mask=mask, other=0.0)
    residual_at = residual_ptr + (row * residual_stride_t)[:, None] + col[None, :]
    residual = tl.load(residual_at, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    # Rounded before it is normalised: the norm sees exactly the residual that the next layer will read.
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(residual_ptr.dtype.element_ty)
    tl.store(residual_at, total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / WIDTH + eps)
    out = total * scale[:, None] * weight[None, :]
    tl.store(
        out_ptr + (row * out_stride_t)[:, None] + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask
    )


@cache
def launch_config(width: int) -> tuple[int, int, int]:
    """(columns a program spans, rows, warps): narrow rows are packed until a program has 2048 elements."""
    assert 0 < width <= MAX_WIDTH, width
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return block, rows, min(16, max(4, block * rows // 512))


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32, rounded once.

    ``x_TE`` is [T, E] or [T, heads, E] (QK norm); tokens and heads may be strided, the last dimension is
    contiguous. ``out`` may be ``x_TE`` itself. Returns ``out``, or a new contiguous tensor of the dtype of
    ``x_TE``.
    """
    assert x_TE.dim() in (2, 3)
    assert x_TE.stride(-1) == 1
    assert weight_E.stride(0) == 1
    if out is None:
        out = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    assert out.shape == x_TE.shape
    assert out.stride(-1) == 1
    width = weight_E.shape[0]
    heads, x_stride_h, out_stride_h = 1, 0, 0
    if x_TE.dim() == 3:
        heads, x_stride_h, out_stride_h = x_TE.shape[1], x_TE.stride(1), out.stride(1)
    num_rows = x_TE.shape[0] * heads
    block, rows, warps = launch_config(width)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TE, weight_E, out, num_rows, heads, x_TE.stride(0), x_stride_h, out.stride(0), out_stride_h, eps,
        width, block, rows, num_warps=warps,
    )  # fmt: skip
    return out


def add_rms_norm(x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, rounded to its dtype; returns ``rms_norm(residual)``, newly made.

    Both are [T, E] with a contiguous last dimension; the result has the dtype of ``x_TE``.
    """
    assert x_TE.shape == residual_TE.shape
    assert x_TE.stride(1) == residual_TE.stride(1) == 1
    num_rows, width = x_TE.shape
    out = torch.empty((num_rows, width), dtype=x_TE.dtype, device=x_TE.device)
    block, rows, warps = launch_config(width)
    _add_rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TE, residual_TE, weight_E, out, num_rows, x_TE.stride(0), residual_TE.stride(0), width, eps,
        width, block, rows, num_warps=warps,
    )  # fmt: skip
    return out
