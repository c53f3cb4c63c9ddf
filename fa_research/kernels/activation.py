"""The elementwise half of a gated MLP, ``act(gate) * up`` of a fused gate/up projection; and the softcap of logits.

Shapes: T tokens, F intermediate size. Bound by memory: 3 F elements moved for each token.
Ideas: Shazeer, "GLU Variants Improve Transformer" (2020); the clamped form is that of gpt-oss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SOFTCAP_BLOCK = 2048


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up, of float32."""
    # Each activation is gate * sigmoid(slope): (1 + tanh(u)) / 2 = sigmoid(2 u) makes GELU one too.
    if ACTIVATION == "gelu_tanh":
        slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    elif ACTIVATION == "swiglu_clamped":
        gate = tl.where(gate > 7.0, 7.0, gate)  # unlike minimum, it leaves NaN
        up = 1.0 + tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        slope = 1.702 * gate
    else:
        slope = gate
    small = tl.exp(-tl.abs(slope))  # never overflows
    return gate * (tl.where(slope < 0.0, small, 1.0) / (1.0 + small)) * up


@triton.jit
def _glu_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride_t,
    out_stride_t,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    pid = tl.program_id(0)
    token = (pid // PARTS).to(tl.int64)
    col = (pid % PARTS) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    row = gate_up_ptr + token * gate_up_stride_t
    gate = tl.load(row + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row + F + col, mask=mask, other=0.0).to(tl.float32)
    out = activate(gate, up, ACTIVATION)
    tl.store(out_ptr + token * out_stride_t + col, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["cap"])
def _softcap_kernel(x_ptr, count, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    small = tl.exp(tl.abs(x) * (-2.0 / cap))  # never overflows
    x = tl.where(x < 0.0, -cap, cap) * ((1.0 - small) / (1.0 + small))
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


def launch_config(num_tokens: int, width: int) -> tuple[int, int]:
    """(columns of a program, warps): more and smaller programs while they do not fill the GPU."""
    block = 1024 if num_tokens <= 64 else 2048
    return min(block, triton.next_power_of_2(width)), 4


def glu(gate_up_T2F: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """``act(gate) * up`` of ``gate_up_T2F`` [T, 2F] = gate | up, in float32, rounded once; returns [T, F].

    activation: `silu`, `gelu_tanh`, or `swiglu_clamped`, which is ``gate * sigmoid(1.702 gate) * (up + 1)`` with gate
    at most 7 and up within [-7, 7]. Rows may be strided, the last dimension is contiguous; the result has the dtype of
    the input.
    """
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    assert gate_up_T2F.shape[1] == 2 * width
    assert gate_up_T2F.stride(1) == 1
    assert activation in ("silu", "gelu_tanh", "swiglu_clamped"), activation
    if out is None:
        out = torch.empty((num_tokens, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    assert out.shape == (num_tokens, width)
    assert out.stride(1) == 1
    block, warps = launch_config(num_tokens, width)
    parts = triton.cdiv(width, block)
    _glu_kernel[(num_tokens * parts,)](
        gate_up_T2F, out, gate_up_T2F.stride(0), out.stride(0), width, block, parts, activation, num_warps=warps
    )  # fmt: skip
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)`` in place, in float32, rounded once; ``x`` is contiguous."""
    assert x.is_contiguous()
    _softcap_kernel[(triton.cdiv(x.numel(), SOFTCAP_BLOCK),)](x, x.numel(), cap, SOFTCAP_BLOCK)
    return x
