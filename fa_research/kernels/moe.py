"""A mixture of experts in four launches: route, gate and up with the activation, down, weighted sum.

Shapes: T tokens, N experts, J experts of a token, P = T * J pairs (number t * J + j), E hidden size, F intermediate
size of one expert.

At decode each expert has a few tokens, and what counts is to read the weights of the experts that were chosen, once.
A program multiplies up to BLOCK_M tokens of one expert with BLOCK_N rows of its weights. Tokens are gathered, and
results stored by pair, where they are used, so that nothing is permuted in memory. Which expert a program has follows
from the count of tokens of each: the grid is as large as any routing may need, and programs in excess end at once. No
value is read on the host, so a CUDA graph may hold it all. The tokens of an expert are listed in the order in which
programs come to claim a place; a pair's result does not depend on its place.

Idea: the fused MoE kernels of vLLM and SGLang (Zheng et al., "SGLang", 2024); gate and up in one program with the
activation is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fa_research.kernels.activation import activate
from fa_research.kernels.common import is_hopper, overlaps_launches
from fa_research.kernels.moe_routing import combine, route

GROUP = tl.constexpr(8)
MULTIPROCESSORS = 132  # of an H200, and of an H100 with SXM


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a grouped product is cut: `block_m` tokens of one expert, `block_n` rows of its weights (of the gate, and as
    many of up), `block_k` columns at a time. With `swap` the weights are the left operand, which on Hopper may come
    straight from shared memory; it takes at least 64 rows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False


def choose_tiles(
    num_pairs: int, num_experts: int, inner: int, gated: bool, itemsize: int, hopper: bool
) -> Tiles:
    """For the tokens that an expert has on average. Block sizes are elements of 2 bytes; wider ones get fewer.

    `hopper`: tiles tuned on an H200, which other GPUs have not the shared memory for (up to 192 KiB). Those without
    need no more than 96 KiB where there is no wgmma. With 16 x 64 x 128 two programs share a multiprocessor (108 KiB
    each), with 16 x 64 x 64 four (54 KiB): where all run at once with the latter only, the former was slower."""
    average = num_pairs / num_experts
    block_k = 128 // itemsize
    large = hopper and itemsize == 2  # float32 would spill registers
    if average <= 8:
        programs = max_blocks(num_pairs, num_experts, 16) * triton.cdiv(inner, 64)
        at_once_if_narrow = 2 * MULTIPROCESSORS < programs <= 4 * MULTIPROCESSORS
        wide = gated and large and not at_once_if_narrow
        return Tiles(16, 64, 2 * block_k if wide else block_k, 4, 4)
    if average <= 24:
        return Tiles(32, 64, block_k, 4, 4)
    if average <= 96:
        return Tiles(64, 64 if gated else 128, block_k, 4, 4)
    if large:
        return Tiles(128, 128, block_k, 8, 4) if gated else Tiles(128, 256, block_k, 8, 3)
    return Tiles(128, 64 if gated else 128, block_k, 8, 4)


# fmt: off
@triton.jit
def _find_block(counts_ptr, block, N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first of its tokens, how many it has) of a block; the expert is N where there are no more blocks."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < N, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(blocks, 0) <= block
    expert = tl.sum(tl.where((experts < N) & before, 1, 0), 0)
    first = tl.sum(tl.where(before, blocks, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    return expert, (block - first) * BLOCK_M, count


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T, or its transpose."""
    # TF32 would be a silent loss in float32; for 16 bits the word means nothing.
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def _experts_kernel(x_ptr, w_ptr, bias_ptr, out_ptr, counts_ptr, pairs_ptr, num_tokens,
                    N: tl.constexpr, BLOCK_E: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, K: tl.constexpr,
                    WIDTH: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, OVERLAP: tl.constexpr):
    """out[pair] = x[pair // PAIRS_PER_ROW] times the weights of the pair's expert, [WIDTH, K]; GATED: [2 * WIDTH, K],
    gate above up, and the activation of both."""
    if OVERLAP and GATED:
        tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    # Blocks in groups, side by side at every tile: those of one expert read its weights while they are in L2.
    group_start = tl.program_id(0) // (GROUP * tiles) * GROUP
    group = tl.minimum(tl.num_programs(0) // tiles - group_start, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    block = group_start + within % group
    expert, first, count = _find_block(counts_ptr, block, N, BLOCK_E, BLOCK_M)
    if OVERLAP:
        # The counts were there before the kernel in front began, which lets this one come up only after its own wait.
        if not GATED:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if expert < N:
        m = first + tl.arange(0, BLOCK_M)
        n = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Rows past the end repeat one that exists and are not stored: the loop needs no masks for them.
        pair = tl.load(pairs_ptr + expert.to(tl.int64) * num_tokens + tl.minimum(m, count - 1))
        row = n if WIDTH % BLOCK_N == 0 else tl.minimum(n, WIDTH - 1)
        x_ptrs = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * K + k[None, :]
        height: tl.constexpr = 2 * WIDTH if GATED else WIDTH
        w_ptrs = w_ptr + expert.to(tl.int64) * (height * K) + (row[:, None] * K + k[None, :])
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = acc
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(x_ptrs + start)
                w = tl.load(w_ptrs + start)
            else:
                inside = (k < K - start)[None, :]
                x = tl.load(x_ptrs + start, mask=inside, other=0.0)
                w = tl.load(w_ptrs + start, mask=inside, other=0.0)
            acc = _multiply(x, w, acc, SWAP)
            if GATED:
                if K % BLOCK_K == 0:
                    w_up = tl.load(w_ptrs + (WIDTH * K + start))
                else:
                    w_up = tl.load(w_ptrs + (WIDTH * K + start), mask=inside, other=0.0)
                acc_up = _multiply(x, w_up, acc_up, SWAP)
        if SWAP:
            acc = tl.trans(acc)
            acc_up = tl.trans(acc_up)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + expert * height + row
            acc += tl.load(bias_ptrs).to(tl.float32)[None, :]
            if GATED:
                acc_up += tl.load(bias_ptrs + WIDTH).to(tl.float32)[None, :]
        if GATED:
            acc = activate(acc, acc_up, ACTIVATION)
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * WIDTH + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None] & (n < WIDTH)[None, :])
# fmt: on


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks that no routing exceeds: every expert that is hit may have one that is not full."""
    hit = min(num_pairs, num_experts)
    return (num_pairs + hit * (block_m - 1)) // block_m


def moe(
    x_TE: Tensor,
    logits_TN: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    experts_per_token: int,
    renormalise: bool,
    activation: str,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """The output [T, E] of the experts for the router's logits. All tensors are contiguous and, but for the logits, of
    one dtype: float16, bfloat16 or float32; sums are in float32.

    Args:
        gate_up: [N, 2F, E], all of gate, then up; gate_up_bias: [N, 2F]. down: [N, E, F]; down_bias: [N, E].
        renormalise: the weights of the chosen experts sum to 1.
        activation: `silu`, `gelu_tanh` or `swiglu_clamped`, see `ops.glu`.
        tiles: of the first and the second product; None: chosen.
    """
    (num_tokens, hidden), num_experts, inner = x_TE.shape, logits_TN.shape[1], down.shape[2]
    assert gate_up.shape == (num_experts, 2 * inner, hidden) and down.shape == (num_experts, hidden, inner)
    assert all(x.is_contiguous() for x in (x_TE, logits_TN, gate_up, down))
    assert activation in ("silu", "gelu_tanh", "swiglu_clamped"), activation
    num_pairs, device = num_tokens * experts_per_token, x_TE.device
    given = (x_TE.element_size(), is_hopper(device))
    first, second = tiles or (
        choose_tiles(num_pairs, num_experts, inner, gated, *given) for gated in (True, False)
    )
    overlap = overlaps_launches(device)
    weights_TJ, counts_N, pairs_NT = route(logits_TN, experts_per_token, renormalise)
    inner_PF = torch.empty((num_pairs, inner), dtype=x_TE.dtype, device=device)
    out_PE = torch.empty((num_pairs, hidden), dtype=x_TE.dtype, device=device)
    block_e = triton.next_power_of_2(num_experts)
    pdl = {"launch_pdl": True} if overlap else {}
    for x, weight, bias, out, per_row, cut, gated in (
        (x_TE, gate_up, gate_up_bias, inner_PF, experts_per_token, first, True),
        (inner_PF, down, down_bias, out_PE, 1, second, False),
    ):
        width = out.shape[1]
        grid = max_blocks(num_pairs, num_experts, cut.block_m) * triton.cdiv(width, cut.block_n)
        _experts_kernel[(grid,)](
            x, weight, bias, out, counts_N, pairs_NT, num_tokens, num_experts, block_e, per_row, x.shape[1], width,
            gated, activation, cut.block_m, cut.block_n, cut.block_k, cut.swap, overlap,
            num_warps=cut.num_warps, num_stages=cut.num_stages, **pdl,
        )  # fmt: skip
    return combine(out_PE, weights_TJ, overlap)
