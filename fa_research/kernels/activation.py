"""SwiGLU's elementwise half: ``silu(gate) * up`` of a fused gate/up projection.

Shapes: T tokens, F intermediate size. Bound by memory: 3 F elements moved for each token.
Idea: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride_t,
    out_stride_t,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    token = (pid // PARTS).to(tl.int64)
    col = (pid % PARTS) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    row = gate_up_ptr + token * gate_up_stride_t
    gate = tl.load(row + col, mask=mask, other=0.0)
    up = tl.load(row + F + col, mask=mask, other=0.0)
    gate = gate.to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + token * out_stride_t + col, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch_config(num_tokens: int, width: int) -> tuple[int, int]:
    """(columns of a program, warps): more and smaller programs while they do not fill the GPU."""
    block = 1024 if num_tokens <= 64 else 2048
    return min(block, triton.next_power_of_2(width)), 4


def silu_mul(gate_up_T2F: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` of ``gate_up_T2F`` [T, 2F] = gate | up, in float32, rounded once; returns [T, F].

    Rows may be strided, the last dimension is contiguous; the result has the dtype of the input.
    """
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    assert gate_up_T2F.shape[1] == 2 * width
    assert gate_up_T2F.stride(1) == 1
    if out is None:
        out = torch.empty((num_tokens, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    assert out.shape == (num_tokens, width)
    assert out.stride(1) == 1
    block, warps = launch_config(num_tokens, width)
    parts = triton.cdiv(width, block)
    _silu_mul_kernel[(num_tokens * parts,)](
        gate_up_T2F, out, gate_up_T2F.stride(0), out.stride(0), width, block, parts, num_warps=warps
    )
    return out
