"""Where a mixture of experts begins and ends: each token's experts, and the sum of their results.

Shapes: T tokens, N experts, J experts of a token, P = T * J pairs (number t * J + j), E hidden size. Each is one
launch, but for the counts' zeros; nothing is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-1.0e30)


# fmt: off
@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(logits_ptr, weights_ptr, counts_ptr, pairs_ptr, num_tokens,
                  N: tl.constexpr, BLOCK_E: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr,
                  RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Softmax over the experts, the J likeliest of each token, and the token's place among those of its experts."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < num_tokens
    expert = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_J)
    known = (expert < N)[None, :]
    logits = tl.load(logits_ptr + (token * N)[:, None] + expert[None, :], mask=live[:, None] & known, other=0.0)
    logits = logits.to(tl.float32)
    # NaN and -inf stay above what is taken or padding: whatever comes in, J different experts that exist go out.
    logits = tl.where(known, tl.where(logits > LOWEST, logits, LOWEST), float("-inf"))
    peak = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - peak[:, None]), 1)
    weights = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    chosen_total = tl.zeros((BLOCK_T,), tl.float32)
    for j in tl.static_range(J):
        best = tl.argmax(logits, 1)
        weight = tl.exp(tl.max(logits, 1) - peak)
        weights = tl.where(column[None, :] == j, weight[:, None], weights)
        chosen_total += weight
        logits = tl.where(expert[None, :] == best[:, None], float("-inf"), logits)
        place = tl.atomic_add(counts_ptr + best, 1, mask=live, sem="relaxed")
        tl.store(pairs_ptr + best.to(tl.int64) * num_tokens + place, token * J + j, mask=live)
    weights = weights / (chosen_total if RENORMALISE else total)[:, None]
    at = (token * J)[:, None] + column[None, :]
    tl.store(weights_ptr + at, weights, mask=live[:, None] & (column < J)[None, :])


@triton.jit
def _combine_kernel(pairs_ptr, weights_ptr, out_ptr, E: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,
                    OVERLAP: tl.constexpr):
    """Each token's J results, weighted and added in float32."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    parts: tl.constexpr = (E + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < E
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(J):
        result = tl.load(pairs_ptr + (token * J + j) * E + column, mask=inside, other=0.0).to(tl.float32)
        total += result * tl.load(weights_ptr + token * J + j)
    tl.store(out_ptr + token * E + column, total.to(out_ptr.dtype.element_ty), mask=inside)
# fmt: on


def route(logits_TN: Tensor, experts_per_token: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest experts of each token: float32 weights [T, J], the softmax over all experts in float32, with
    `renormalise` over the chosen alone; int32 counts [N] of each expert's pairs, and which these are, int32 [N, T], in
    no particular order. Between equal logits the lower expert comes first."""
    num_tokens, num_experts = logits_TN.shape
    assert logits_TN.is_contiguous()
    device = logits_TN.device
    counts_N = torch.zeros(num_experts, dtype=torch.int32, device=device)
    pairs_NT = torch.empty((num_experts, num_tokens), dtype=torch.int32, device=device)
    weights_TJ = torch.empty((num_tokens, experts_per_token), dtype=torch.float32, device=device)
    block_t = 1 if num_tokens <= 1024 else 4
    _route_kernel[(triton.cdiv(num_tokens, block_t),)](
        logits_TN, weights_TJ, counts_N, pairs_NT, num_tokens, num_experts, triton.next_power_of_2(num_experts),
        experts_per_token, triton.next_power_of_2(experts_per_token), renormalise, block_t, num_warps=block_t,
    )  # fmt: skip
    return weights_TJ, counts_N, pairs_NT


def combine(pairs_PE: Tensor, weights_TJ: Tensor, overlap: bool) -> Tensor:
    """Each token's results, weighted and added in float32: [T, E]. `overlap`: to be started while the kernel before it
    still runs."""
    num_tokens, experts_per_token = weights_TJ.shape
    hidden = pairs_PE.shape[1]
    out_TE = torch.empty((num_tokens, hidden), dtype=pairs_PE.dtype, device=pairs_PE.device)
    block = 512 if num_tokens <= 64 else 1024
    pdl = {"launch_pdl": True} if overlap else {}
    _combine_kernel[(num_tokens * triton.cdiv(hidden, block),)](
        pairs_PE, weights_TJ, out_TE, hidden, experts_per_token, block, overlap, num_warps=4, **pdl
    )
    return out_TE
